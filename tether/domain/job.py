"""Jobs, lanes, outcomes: the values that cross between services. Frozen, closed, without I/O."""

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
"""The latest deadline a durable job may have, from its submission."""

Parameter = str | int | float | bool


class JobState(StrEnum):
    """Closed. Exactly one of the last five ends a job."""

    SCHEDULED = "scheduled"  # waits for its time
    QUEUED = "queued"  # in a lane, no worker has begun
    RUNNING = "running"  # a worker holds it
    SUCCEEDED = "succeeded"  # has outputs
    FAILED = "failed"  # the model refused it; running it again would not help
    CANCELLED = "cancelled"  # its owner took it back
    EXPIRED = "expired"  # its deadline passed before it ended
    DEAD = "dead"  # every attempt ended without an answer


TERMINAL = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DEAD},
)


class LaneKind(StrEnum):
    INFER = "infer"  # memory-backed, a caller waits
    JOB = "job"  # file-backed, durable


class Priority(StrEnum):
    """Order in which a worker takes durable jobs; infer lanes come before all of them."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


SHARED = "shared"
"""The pool of every tenant that is not isolated; no tenant may have this name."""


class Lane(msgspec.Struct, frozen=True):
    """One queue: the jobs of a kind for one model version, in one region, of one pool: shared, or an isolated tenant's."""

    kind: LaneKind
    model: str
    version: int
    region: str = "local"
    pool: str = SHARED
    priority: Priority = Priority.NORMAL

    @property
    def tenant(self) -> str:
        """The isolated tenant whose lane it is; empty for a shared one."""
        return "" if self.pool == SHARED else self.pool


class Sealed(msgspec.Struct, frozen=True):
    """A payload that only holders of the data key ``key_id`` can open."""

    key_id: bytes
    box: bytes


class Job(msgspec.Struct, frozen=True):
    """One request for one model version. ``deadline`` is UTC, seconds since the epoch."""

    id: JobId
    tenant: str
    inputs: tuple[Tensor, ...]
    deadline: float
    outputs: tuple[str, ...] = ()
    """Names of the wanted outputs in the wanted order; empty means all, in the model's order."""
    request_id: str = ""
    traceparent: str = ""
    sealed: Sealed | None = None
    """A sealed tenant's inputs and outputs; where they are opened, ``inputs`` and ``outputs`` have them too."""

    @property
    def size(self) -> int:
        """About how many bytes its payload takes in a message."""
        return sum([len(tensor.data) for tensor in self.inputs]) if self.sealed is None else len(self.sealed.box)


class Failure(msgspec.Struct, frozen=True):
    """Why a job did not succeed: an error code of the tree and one line for a person."""

    code: str
    message: str


class Outcome(msgspec.Struct, frozen=True):
    """How one job ended. Times are UTC, seconds since the epoch; 0.0 means it never started."""

    job: JobId
    state: JobState
    outputs: tuple[Tensor, ...] = ()
    error: Failure | None = None
    attempts: int = 0
    worker: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    sealed: Sealed | None = None
    """``outputs`` and ``error`` of a sealed tenant's job, which are then empty."""


_BY_WORK = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD})


def as_it_counts(outcome: Outcome, deadline: float, stored_at: float = 0.0) -> Outcome:
    """How a durable job ended: what its work came to after its deadline does not count, whoever looked meanwhile.

    ``deadline`` is the latest time (UTC seconds) at which it may have finished by its worker's clock; ``stored_at`` is when
    the broker stored its end, and may be :data:`STORED_S` later.
    """
    if outcome.state not in _BY_WORK or (outcome.finished_at <= deadline and stored_at <= deadline + STORED_S):
        return outcome
    late = Failure(DeadlineExceeded.code, "the job ended after its deadline")
    return msgspec.structs.replace(outcome, state=JobState.EXPIRED, outputs=(), error=late, sealed=None)


STORED_S = 2.0
"""An end that was in time may take this long to be stored; after that anyone may call the job expired."""


class JobRecord(msgspec.Struct, frozen=True):
    """What is known of a durable job from the moment it was accepted."""

    id: JobId
    tenant: str
    model: str
    version: int
    priority: Priority
    submitted_at: float
    deadline: float
    digest: str
    """Digest of the request, so that an Idempotency-Key cannot be used for two different requests."""
    bundle: str
    """Message id of the bundle that carries the job: where its attempts are noted. Empty: the job is not accepted yet."""
    request_id: str = ""
    pool: str = SHARED
    """Whose lanes and results hold it; it stays when the tenant ceases to be isolated, or begins to be."""
    storing: str = ""
    """Of a job with an Idempotency-Key that is not accepted yet: message id of the bundle that is being stored."""
    size: int = 0
    """About how many bytes the job takes in its lane."""

    @property
    def key(self) -> str:
        """The key of the record in its bucket. Ids of homes of before do not begin with their tenant's mark."""
        return record_key(self.id) if self.id.startswith(tenant_mark(self.tenant)) else self.id[:RECORD_KEY_LENGTH]


class AttemptNote(msgspec.Struct, frozen=True):
    """A worker began a bundle, or one job of a redelivered bundle; or, with attempt 0, it handed a bundle back of which no job
    ran any more. ``started_at`` is UTC seconds."""

    attempt: int
    worker: str
    started_at: float
    deliveries: int = 0
    """Of a bundle that was handed back: how often it had been delivered, each time without harm."""


CANCELLATION_TOLD_S = 60.0
"""Workers are told of a cancelled job, and remember it for this long."""


class Withdrawal(msgspec.Struct, frozen=True):
    """Jobs of an infer lane that nobody waits for any more. After ``until``, UTC seconds, none of them could run anyhow."""

    jobs: tuple[str, ...]
    until: float


class _Random(threading.local):
    """Random bytes from the system, fetched for many ids at once; each thread, and a forked child, has its own."""

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
    """16 lower-case hex characters."""
    return _random.take(8).hex()


RECORD_KEY_LENGTH = 24
"""Characters of a job's id that name its record; the others make the id a new one each time a key is used again."""

_MARK_LENGTH = 8


def tenant_mark(tenant: str) -> str:
    """The first characters of the ids of a tenant's durable jobs: its records are found by them, without a look at others'."""
    return hashlib.blake2b(tenant.encode(), digest_size=_MARK_LENGTH // 2, person=b"tether-mark").hexdigest()


def record_key(job_id: str) -> str:
    """The key of a job's record in the bucket ``jobs``, from the job's id: the mark of its tenant, and the rest."""
    return f"{job_id[:_MARK_LENGTH]}.{job_id[_MARK_LENGTH:RECORD_KEY_LENGTH]}"


def older_record_keys(job_id: str) -> tuple[str, str]:
    """The keys that records have in homes of before."""
    return job_id[:RECORD_KEY_LENGTH], job_id


def idempotency_digest(tenant: str, key: str) -> str:
    """What an Idempotency-Key stands for: the same for the same tenant and key, on every gateway and after every
    restart. The id of its job begins with its first :data:`RECORD_KEY_LENGTH` characters."""
    digest = hashlib.blake2b(f"{tenant}\0{key}".encode(), digest_size=16, person=b"tether-idem")
    return tenant_mark(tenant) + digest.hexdigest()


def digest_of_before(digest: str) -> str:
    """:func:`idempotency_digest` as homes of before have it: ids of jobs there begin with it, or are it."""
    return digest[_MARK_LENGTH:]


def new_durable_job_id(tenant: str) -> JobId:
    """An id for a durable job without an Idempotency-Key."""
    return JobId(tenant_mark(tenant) + _random.take(12).hex())


def new_keyed_job_id(digest: str) -> JobId:
    """An id for a job under an Idempotency-Key. No two jobs have the same one, also when the key is used again after
    its first job was forgotten: what is still stored of that one cannot be taken for the new one's."""
    return JobId(digest[:RECORD_KEY_LENGTH] + _random.take(4).hex())
