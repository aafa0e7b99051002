"""Durable jobs: accept, look at, wait for, cancel.

A job is accepted when its bundle is in its lane and its record in the ``jobs`` bucket. How it ended is one entry of the
results stream, and the first entry wins: a worker's result, a cancellation, or an expiry. Its state is worked out from
these whenever somebody asks, so there is no state that could be written wrongly.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.bus.queue import BusResults
from tether.bus.tenant_keys import TenantSeals
from tether.envelope import MessageType
from tether.errors import (
    BadEncoding,
    DeadlineExceeded,
    IdempotencyConflict,
    JobCancelled,
    JobNotFound,
    ResultConflict,
    Unavailable,
)
from tether.gateway_http.catalog import Catalog, Served
from tether.gateway_http.job_bundler import JobBundler, Records, Submission
from tether.gateway_http.job_room import JobRoom
from tether.gateway_http.job_view import State, read_outcome, view
from tether.gateway_http.tenants import Tenants
from tether.job import (
    AttemptNote,
    Failure,
    Job,
    JobId,
    JobRecord,
    JobState,
    Outcome,
    Priority,
    idempotent_job_id,
    new_job_id,
)
from tether.lifecycle import Tasks
from tether.model import check_outputs
from tether.tensor import Tensor

log = logging.getLogger(__name__)

GRACE_S = 2.0
"""After its deadline a job gets this long for a result that is on its way, before anyone may call it expired."""

_POLL_S = 1.0
_GATHER_S = 0.02
"""Of many jobs many end together: one look for all of them."""

_CLAIM_TRIES = 3
"""A claim that is lost is looked at once more: its winner may have sent another request."""

_WINDOW = 512
_MAX_WINDOWS = 20


Row = tuple[int, JobRecord]
"""A record and its sequence in the bucket's stream."""

Rows = list[Row]
Page = tuple[list[dict[str, Any]], str | None]

Sees = Callable[[str], bool]
"""Whether the caller may use a model of this name."""


def _all(_model: str) -> bool:
    return True


class NewJob(msgspec.Struct, frozen=True):
    """A request for a durable job, parsed and resolved; without a priority it gets that of its model."""

    served: Served
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    priority: Priority | None
    deadline_s: float
    idempotency_key: str
    request_id: str
    traceparent: str = ""


class JobService:
    """Jobs of every tenant, as one gateway sees them."""

    def __init__(
        self, bus: Bus, catalog: Catalog, tenants: Tenants, tasks: Tasks, seals: TenantSeals, *, room: JobRoom
    ) -> None:
        self._bus = bus
        self._seals = seals
        self.room = room
        self._catalog = catalog
        self._tenants = tenants
        self._results = BusResults(bus)
        self._records = SignedBucket(bus, "jobs", MessageType.RECORD)
        self._attempts = SignedBucket(bus, "attempts", MessageType.ATTEMPT)
        self._claims = Records(bus)
        self._bundler = JobBundler(bus, tasks, tenants.weight)

    # submit

    async def submit(self, tenant: str, requests: Sequence[NewJob]) -> list[dict[str, Any]]:
        """Accept jobs; returns when the broker holds every one. Nothing is queued when one of them is not valid.

        Raises:
            BadTensor, ModelNotReady: before anything was queued.
            IdempotencyConflict: a key was used for another request.
            QuotaExceeded, QueueFull, BrokerUnavailable: try again with the same key.
        """
        scope = self._tenants.scope(tenant)
        for request in requests:
            self._catalog.check_inputs(request.served, request.inputs, scope)
            check_outputs(request.served.manifest, request.outputs)
            self._catalog.require_lane(request.served, scope)
        now = self._bus.clock.utc()
        submissions = [self._submission(tenant, scope, request, now) for request in requests]
        known = await self._known(
            [item for item, request in zip(submissions, requests, strict=True) if request.idempotency_key]
        )
        fresh = [item for item in submissions if item.job.id not in known]
        async with self.room.hold(tenant, [item.record for item in fresh]):
            await asyncio.gather(*[self._bundler.add(item) for item in fresh])
        for item in fresh:
            metrics.JOBS_ACCEPTED.labels(item.record.model).inc()
            if log.isEnabledFor(logging.DEBUG):
                log.debug("accepted", extra={"action": "job_accepted", **_ids(item.record)})
        states = {item.job.id: State(item.record) for item in fresh}
        if known:
            states.update(await self._states(list(known.values())))
        return [view(states[item.job.id]) for item in submissions]

    def _submission(self, tenant: str, scope: str, request: NewJob, now: float) -> Submission:
        key = request.idempotency_key
        job_id = idempotent_job_id(tenant, key) if key else new_job_id()
        deadline = now + request.deadline_s
        job = Job(job_id, tenant, request.inputs, deadline, request.outputs, request.request_id, request.traceparent)
        digest = _digest(request) if key else ""
        lane = request.served.job_lane(request.priority or self._catalog.default_priority(request.served), scope)
        record = JobRecord(
            id=job_id,
            tenant=tenant,
            model=lane.model,
            version=lane.version,
            priority=lane.priority,
            submitted_at=now,
            deadline=deadline,
            digest=self._seals.digest(tenant, digest),
            bundle="",
            request_id=request.request_id,
            scope=scope,
        )
        return Submission(lane, self._seals.seal(job), record, digest)

    async def _known(self, items: Sequence[Submission]) -> dict[JobId, JobRecord]:
        """Jobs that were accepted before under the same idempotency key; the other keys are ours from now on.

        A key that was claimed and never accepted belongs to whoever sends the same request again.
        """
        if not items:
            return {}
        for _ in range(_CLAIM_TRIES):
            records = await self._read_records([item.job.id for item in items], accepted=False)
            for item in items:
                record = records.get(item.job.id)
                if record is not None and not await self._seals.same_digest(record.tenant, record.digest, item.digest):
                    raise _conflict()
            new = [item.record for item in items if item.job.id not in records]
            if all(await asyncio.gather(*[self._claims.claim(record) for record in new])):
                return {job: record for job, record in records.items() if record.bundle}
        raise Unavailable("the Idempotency-Key is in use just now; try again")

    # look

    async def get(self, tenant: str, job_id: str, wait_s: float = 0.0, sees: Sees = _all) -> dict[str, Any]:
        """The job object; with ``wait_s`` as soon as the job has ended, or after that many seconds.

        Raises:
            JobNotFound: there is no such job, it is another tenant's, or of a model that the caller may not use.
        """
        (found,) = await self.get_many(tenant, [job_id], wait_s, sees)
        return found

    async def get_many(self, tenant: str, ids: Sequence[str], wait_s: float, sees: Sees = _all) -> list[dict[str, Any]]:
        """Job objects in the order of ``ids``; with ``wait_s`` as soon as all of them have ended."""
        records = await self._read_records(ids)
        for job_id in ids:
            record = records.get(JobId(job_id))
            if record is None or record.tenant != tenant or not sees(record.model):
                error = JobNotFound(f"there is no job '{job_id[:64]}'", field="id")
                error.hidden = record is not None
                raise error
        ordered = [records[JobId(job_id)] for job_id in ids]
        states = await self._states(ordered)
        if wait_s > 0 and not all(state.ended for state in states.values()):
            await self._wait(states, wait_s)
            states = await self._states(ordered)
        return [view(states[record.id]) for record in ordered]

    async def _wait(self, states: dict[JobId, State], wait_s: float) -> None:
        """Listen for results; what is heard may have been refused by the stream, so it only says: look again."""
        heard = asyncio.Event()

        async def arrived(_: object) -> None:
            heard.set()

        end = self._bus.clock.monotonic() + wait_s
        open_ids = [job_id for job_id, state in states.items() if not state.ended]
        async with AsyncExitStack() as stack:
            for job_id in open_ids:
                subject = self._bus.names.result(job_id, states[job_id].record.scope)
                subscription = await self._bus.subscribe(subject, arrived, confirmed=False)
                stack.push_async_callback(subscription.unsubscribe)
            while open_ids and (left := end - self._bus.clock.monotonic()) > 0:
                heard.clear()
                open_ids = await self._still_open(open_ids, states)
                if open_ids:
                    try:
                        async with asyncio.timeout(min(left, _POLL_S)):
                            await heard.wait()
                            await asyncio.sleep(_GATHER_S if len(open_ids) > 1 else 0)
                    except TimeoutError:
                        continue

    async def _still_open(self, ids: list[JobId], states: dict[JobId, State]) -> list[JobId]:
        ended = await self._frames([states[job].record for job in ids])
        now = self._bus.clock.utc()
        return [job for job in ids if job not in ended and states[job].record.deadline + GRACE_S > now]

    async def list(self, tenant: str, *, state: str, model: str, limit: int, cursor: str, sees: Sees = _all) -> Page:
        """A tenant's jobs of models that the caller sees, newest first; and the next page's cursor (None: no more)."""
        stream, subjects = self._records.raw.stream, self._records.raw.subject(">")
        upper = int(cursor) - 1 if cursor else await self._bus.direct_last(stream, subjects)
        found: list[dict[str, Any]] = []
        for _ in range(_MAX_WINDOWS):
            if upper < 1:
                return found, None
            lower = max(1, upper - _WINDOW + 1)
            rows = await self._window(tenant, lambda name: model in ("", name) and sees(name), lower, upper)
            states = await self._states([record for _, record in rows])
            for sequence, record in reversed(rows):
                shown = view(states[record.id])
                if state and shown["state"] != state:
                    continue
                found.append(shown)
                if len(found) == limit:
                    return found, str(sequence)
            upper = lower - 1
        return found, str(upper + 1)

    async def _window(self, tenant: str, wanted: Sees, lower: int, upper: int) -> Rows:
        rows: Rows = []
        stream, subjects = self._records.raw.stream, self._records.raw.subject(">")
        async for item in self._bus.direct_scan(stream, subjects, start=lower, batch=_WINDOW):
            if item.sequence > upper:
                break
            record = self._open_record(item.subject, item.data)
            if record is None or record.tenant != tenant or not record.bundle:
                continue
            if wanted(record.model):
                rows.append((item.sequence, record))
        return rows

    # cancel

    async def cancel(self, tenant: str, job_id: str, sees: Sees = _all) -> dict[str, Any]:
        """End a job that has not ended.

        Raises:
            JobNotFound: as :meth:`get`.
            ResultConflict: it had already ended.
        """
        shown = await self.get(tenant, job_id, sees=sees)
        failure = Failure(JobCancelled.code, "the job was cancelled")
        (record,) = (await self._read_records([job_id])).values()
        if not await self._end(record, JobState.CANCELLED, failure, int(shown["attempts"])):
            shown = await self.get(tenant, job_id)
            raise ResultConflict(f"job '{job_id}' has already ended: {shown['state']}", field="id")
        return await self.get(tenant, job_id)

    async def _end(self, record: JobRecord, state: JobState, failure: Failure, attempts: int) -> bool:
        job = record.id
        outcome = Outcome(job, state, (), failure, attempts, self._bus.signer.name, 0.0, self._bus.clock.utc())
        subject = self._bus.names.result(job, record.scope)
        frame = self._bus.signer.seal(MessageType.RESULT, subject, codec.encode_outcomes([outcome]), jobs=(job,))
        first = await self._results.commit(job, frame, scope=record.scope, deadline=record.deadline)
        if first:
            metrics.JOBS_FINISHED.labels(record.model, state.value).inc()
            log.info("ended here", extra={"action": "job_ended", "state": state.value, **_ids(record)})
        return first

    # states

    async def _states(self, records: Sequence[JobRecord]) -> dict[JobId, State]:
        """What is known of each job; those whose deadline is over without a result are ended here."""
        if not records:
            return {}
        outcomes = await self._outcomes(records)
        now = self._bus.clock.utc()
        late = [record for record in records if record.id not in outcomes and record.deadline + GRACE_S < now]
        if late:
            failure = Failure(DeadlineExceeded.code, "the deadline passed before the job ended")
            await asyncio.gather(*[self._end(record, JobState.EXPIRED, failure, 0) for record in late])
            outcomes.update(await self._outcomes(late))
        notes = await self._notes([record for record in records if record.id not in outcomes])
        return {record.id: State(record, outcomes.get(record.id), notes.get(record.id)) for record in records}

    async def _outcomes(self, records: Sequence[JobRecord]) -> dict[JobId, Outcome]:
        frames = await self._frames(records)
        found: dict[JobId, Outcome] = {}
        for record in records:
            outcome = read_outcome(self._bus, record, frames[record.id]) if record.id in frames else None
            if outcome is not None:
                found[record.id] = await self._seals.keyring.open_outcome(record.tenant, outcome)
        return found

    async def _frames(self, records: Sequence[JobRecord]) -> dict[str, bytes]:
        """How jobs ended, each in the results of the scope that its record names."""
        by_scope: dict[str, list[JobId]] = {}
        for record in records:
            by_scope.setdefault(record.scope, []).append(record.id)
        found = await asyncio.gather(*[self._results.find(ids, scope=scope) for scope, ids in by_scope.items()])
        return {job: frame for frames in found for job, frame in frames.items()}

    async def _notes(self, records: Sequence[JobRecord]) -> dict[JobId, AttemptNote]:
        """The last attempt of each job: a note of its own counts more than its bundle's."""
        if not records:
            return {}
        bucket, key = self._attempts.raw, self._bus.names.attempt_key
        keys = {bucket.subject(key(of, item.scope)): of for item in records for of in (item.bundle, item.id) if of}
        stored = await self._bus.direct_batch(bucket.stream, list(keys))
        notes: dict[str, AttemptNote] = {}
        for subject, item in stored.items():
            envelope = self._bus.open_frame(item.data, subject, MessageType.ATTEMPT)
            if envelope is not None:
                notes[keys[subject]] = codec.decode_note(envelope.body)
        found = {record.id: notes.get(record.id) or notes.get(record.bundle) for record in records}
        return {job: note for job, note in found.items() if note is not None}

    async def _read_records(self, ids: Sequence[str], *, accepted: bool = True) -> dict[JobId, JobRecord]:
        bucket = self._records.raw
        subjects = [bucket.subject(job_id) for job_id in ids if _is_job_id(job_id)]
        stored = await self._bus.direct_batch(bucket.stream, subjects)
        records = [self._open_record(subject, item.data) for subject, item in stored.items()]
        return {record.id: record for record in records if record is not None and (record.bundle or not accepted)}

    def _open_record(self, subject: str, frame: bytes) -> JobRecord | None:
        envelope = self._bus.open_frame(frame, subject, MessageType.RECORD)
        if envelope is None:
            return None
        try:
            return codec.decode_record(envelope.body)
        except BadEncoding as error:
            log.warning("unreadable record: %s", error, extra={"action": "entry_refused"})
            return None


def _ids(record: JobRecord) -> dict[str, Any]:
    """The fields by which a job is found in logs."""
    return {
        "job_id": record.id,
        "request_id": record.request_id,
        "tenant": record.tenant,
        "model": record.model,
        "version": record.version,
    }


def _is_job_id(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)


def _digest(request: NewJob) -> str:
    """What makes two requests the same: model, inputs, outputs, asked priority; not the version an alias meant meanwhile."""
    manifest = request.served.manifest
    whole = hashlib.sha256(f"{manifest.name}\0{request.priority or Priority.NORMAL}\0{request.outputs}".encode())
    for tensor in request.inputs:
        whole.update(f"{tensor.name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        whole.update(tensor.data)
    return whole.hexdigest()


def _conflict() -> IdempotencyConflict:
    return IdempotencyConflict(
        "this Idempotency-Key was used for another request; use a new key", field="Idempotency-Key"
    )
