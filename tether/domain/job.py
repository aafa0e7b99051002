"""Jobs, lanes, outcomes: values that services exchange. Frozen, closed, without I/O."""

from __future__ import annotations

import hashlib
import os
import threading
from enum import StrEnum
from typing import NewType

import msgspec

from tether.domain.tensor import Tensor
from tether.errors import DeadlineExceeded

JobId = NewType("JobId", str)
"""32 lower-case hex characters, unguessable."""

LONGEST_DEADLINE_S = 30 * 86400
"""Maximum deadline of a durable job, from its submission."""

Parameter = str | int | float | bool


class JobState(StrEnum):
    """Closed. Exactly one of the last five is a job's final state."""

    SCHEDULED = "scheduled"  # waits for its start time
    QUEUED = "queued"  # in a lane, not started by a worker
    RUNNING = "running"  # a worker is processing it
    SUCCEEDED = "succeeded"  # has outputs
    FAILED = "failed"  # the model rejected it; a retry would not help
    CANCELLED = "cancelled"  # its owner cancelled it
    EXPIRED = "expired"  # its deadline passed before it finished
    DEAD = "dead"  # every attempt ended without a reply


TERMINAL = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DEAD},
)


class LaneKind(StrEnum):
    INFER = "infer"  # memory-backed, a caller waits
    JOB = "job"  # file-backed, durable


class Priority(StrEnum):
    """Order in which workers take durable jobs; infer lanes come before all of them."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


SHARED = "shared"
"""The pool of all tenants that are not isolated; reserved as a tenant name."""


class Lane(msgspec.Struct, frozen=True):
    """One queue: jobs of a kind for one model version, in one region and pool."""

    kind: LaneKind
    model: str
    version: int
    region: str = "local"
    pool: str = SHARED
    priority: Priority = Priority.NORMAL

    @property
    def tenant(self) -> str:
        """The isolated tenant that owns the lane; empty if shared."""
        return "" if self.pool == SHARED else self.pool


class Sealed(msgspec.Struct, frozen=True):
    """A payload encrypted with the data key ``key_id``."""

    key_id: bytes
    box: bytes


class Job(msgspec.Struct, frozen=True):
    """One request for one model version. ``deadline`` is UTC, seconds since the epoch."""

    id: JobId
    tenant: str
    inputs: tuple[Tensor, ...]
    deadline: float
    outputs: tuple[str, ...] = ()
    """Requested outputs in order; empty means all, in the model's order."""
    request_id: str = ""
    traceparent: str = ""
    sealed: Sealed | None = None
    """An encrypted tenant's inputs and outputs; after decryption, ``inputs`` and ``outputs`` have them too."""

    @property
    def size(self) -> int:
        """Approximate bytes of its payload in a message."""
        return sum([len(tensor.data) for tensor in self.inputs]) if self.sealed is None else len(self.sealed.box)


class Failure(msgspec.Struct, frozen=True):
    """Why a job failed: an error code and a one-line message."""

    code: str
    message: str


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of one job. Times are UTC seconds since the epoch; 0.0: never started."""

    job: JobId
    state: JobState
    outputs: tuple[Tensor, ...] = ()
    error: Failure | None = None
    attempts: int = 0
    worker: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    sealed: Sealed | None = None
    """``outputs`` and ``error`` of an encrypted tenant's job, which are then empty."""


_BY_WORK = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD})


def as_it_counts(outcome: Outcome, deadline: float, stored_at: float = 0.0) -> Outcome:
    """Return the effective outcome of a durable job: a result after its deadline counts as expired, whoever
    reads it.

    ``deadline`` is the latest finish (UTC seconds) on its worker's clock; ``stored_at`` is when the broker
    stored its outcome, which may be :data:`STORED_S` later.
    """
    if outcome.state not in _BY_WORK or (outcome.finished_at <= deadline and stored_at <= deadline + STORED_S):
        return outcome
    late = Failure(DeadlineExceeded.code, "the job finished after its deadline")
    return msgspec.structs.replace(outcome, state=JobState.EXPIRED, outputs=(), error=late, sealed=None)


STORED_S = 2.0
"""Maximum delay until an outcome that was in time is stored; after that anyone may expire the job."""


class JobRecord(msgspec.Struct, frozen=True):
    """The record of a durable job, from its acceptance on."""

    id: JobId
    tenant: str
    model: str
    version: int
    priority: Priority
    submitted_at: float
    deadline: float
    digest: str
    """Digest of the request, so that an Idempotency-Key cannot be reused for a different request."""
    bundle: str
    """Message id of the job's bundle, which its attempts are recorded under. Empty: not accepted yet."""
    request_id: str = ""
    pool: str = SHARED
    """Pool of its lane and result; unchanged if the tenant's isolation changes later."""
    storing: str = ""
    """For a job with an Idempotency-Key that is not accepted yet: message id of the bundle being stored."""
    size: int = 0
    """Approximate bytes of the job in its lane."""

    @property
    def key(self) -> str:
        """The key of the record in its bucket. In older data directories ids do not start with their tenant's
        mark."""
        return record_key(self.id) if self.id.startswith(tenant_mark(self.tenant)) else self.id[:RECORD_KEY_LENGTH]


class AttemptNote(msgspec.Struct, frozen=True):
    """A worker started a bundle, or one job of a redelivered bundle; with attempt 0, it returned an unstarted
    bundle.

    ``started_at`` is UTC seconds.
    """

    attempt: int
    worker: str
    started_at: float
    deliveries: int = 0
    """For a returned bundle: how often it had been delivered, each time without harm."""


CANCELLATION_TOLD_S = 60.0
"""Workers are notified of a cancelled job, and remember it, for this many seconds."""


class Withdrawal(msgspec.Struct, frozen=True):
    """Withdrawn jobs of an infer lane. After ``until`` (UTC seconds) none of them can run anyway."""

    jobs: tuple[str, ...]
    until: float


class _Random(threading.local):
    """Random bytes from the system, fetched for many ids at once, per thread and process."""

    def __init__(self) -> None:
        self._pool = b""
        self._next = 0
        self._pid = 0

    def take(self, count: int) -> bytes:
        end = self._next + count
        if end > len(self._pool) or self._pid != os.getpid():
            self._pool, self._next, end, self._pid = os.urandom(4096), 0, count, os.getpid()
        taken = self._pool[self._next : end]
        self._next = end
        return taken


_random = _Random()


def new_job_id() -> JobId:
    return JobId(_random.take(16).hex())


def new_request_id() -> str:
    """Return 16 lower-case hex characters."""
    return _random.take(8).hex()


RECORD_KEY_LENGTH = 24
"""Characters of a job's id that identify its record; the rest makes the id unique each time a key is reused."""

_MARK_LENGTH = 8


def tenant_mark(tenant: str) -> str:
    """Return the prefix of the ids of a tenant's durable jobs, by which its records are found."""
    return hashlib.blake2b(tenant.encode(), digest_size=_MARK_LENGTH // 2, person=b"tether-mark").hexdigest()


def record_key(job_id: str) -> str:
    """Return the key of a job's record in the bucket ``jobs``: its tenant's mark and the rest of its id."""
    return f"{job_id[:_MARK_LENGTH]}.{job_id[_MARK_LENGTH:RECORD_KEY_LENGTH]}"


def older_record_keys(job_id: str) -> tuple[str, str]:
    """Return the keys of the record in older data directories."""
    return job_id[:RECORD_KEY_LENGTH], job_id


def idempotency_digest(tenant: str, key: str) -> str:
    """Return the identity of an Idempotency-Key, which depends on tenant and key alone.

    The id of its job starts with its first :data:`RECORD_KEY_LENGTH` characters.
    """
    digest = hashlib.blake2b(f"{tenant}\0{key}".encode(), digest_size=16, person=b"tether-idem")
    return tenant_mark(tenant) + digest.hexdigest()


def digest_of_before(digest: str) -> str:
    """Return :func:`idempotency_digest` as in older data directories: ids of jobs there start with it or
    equal it."""
    return digest[_MARK_LENGTH:]


def new_durable_job_id(tenant: str) -> JobId:
    """Return an id for a durable job without an Idempotency-Key."""
    return JobId(tenant_mark(tenant) + _random.take(12).hex())


def new_keyed_job_id(digest: str) -> JobId:
    """Return a unique id for a job with an Idempotency-Key.

    It is unique even if the key is reused after its first job was deleted: remains of that job cannot be
    mistaken for the new one's.
    """
    return JobId(digest[:RECORD_KEY_LENGTH] + _random.take(4).hex())
