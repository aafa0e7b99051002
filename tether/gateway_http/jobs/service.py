"""Durable jobs: submit, get, wait, list, cancel.

A job is accepted once its bundle is in its lane and its record in the ``jobs`` bucket. Its outcome is one
entry of the results stream, and the first entry wins: a worker's result, a cancellation or an expiry. Its
state is computed from these on every read, so no stored state can be wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec

from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.keyrings import TenantSeals
from tether.bus.retry import RetryDeadline
from tether.crypto import MessageType
from tether.domain.job import (
    CANCELLATION_TOLD_S,
    STORED_S,
    AttemptNote,
    Failure,
    JobId,
    JobRecord,
    JobState,
    Lane,
    LaneKind,
    Outcome,
    as_it_counts,
)
from tether.errors import BrokerUnavailable, DeadlineExceeded, JobCancelled, JobNotFound, ResultConflict
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.bodies.large_bodies import LargeBodies
from tether.gateway_http.bundling.withdrawals import Withdrawals
from tether.gateway_http.jobs.ends import JobEnds
from tether.gateway_http.jobs.listing import JobList, ListQuery, Page, Sees, before
from tether.gateway_http.jobs.output_budget import AT_ONCE, OutputRoom
from tether.gateway_http.jobs.queued_jobs_quota import QueuedJobsQuota
from tether.gateway_http.jobs.records import JobRecordStore
from tether.gateway_http.jobs.submission import JobSubmitter, NewJob
from tether.gateway_http.jobs.view import JobSnapshot, read_outcome, view
from tether.gateway_http.models.catalog import Catalog
from tether.process.lifecycle import Tasks
from tether.streams.job_queue import BusResults
from tether.wire import codec

_POLL_S = 1.0
_SOON_S = 0.005
"""Delay after a result's message was seen, which may be stored a moment later."""
"""Workers remember a cancelled job for this long; for a later delivery they find the stored outcome."""
_GATHER_S = 0.02
"""Many jobs tend to finish together: one read for all of them."""


T = TypeVar("T")


def _all(_model: str) -> bool:
    return True


def _few(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split items into groups whose results fit into memory together."""
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


class JobService:
    """Durable jobs of all tenants, as one gateway sees them."""

    def __init__(
        self,
        bus: Bus,
        catalog: Catalog,
        tenants: Tenants,
        tasks: Tasks,
        seals: TenantSeals,
        *,
        room: QueuedJobsQuota,
        shared: Callable[[str], bool],
        large: LargeBodies,
    ) -> None:
        self._bus = bus
        self._large = large
        self._seals = seals
        self.room = room
        self._results = BusResults(bus)
        self._attempts = KvBucket(bus, "attempts")
        self._records = JobRecordStore(bus)
        self._list = JobList(bus, self._records, self._states)
        self._ends = JobEnds(bus)
        self._withdrawals = Withdrawals(bus, tasks)
        self._submitter = JobSubmitter(
            bus, catalog, tenants, tasks, seals, records=self._records, room=room, shared=shared
        )

    async def submit(self, tenant: str, requests: Sequence[NewJob]) -> list[dict[str, Any]]:
        """Accept jobs; return once the broker has stored all of them. Raises as :meth:`JobSubmitter.submit`."""
        accepted = await self._submitter.submit(tenant, requests)
        states = {one.record.id: JobSnapshot(one.record) for one in accepted if not one.before}
        if earlier := [one.record for one in accepted if one.before]:
            states.update(await self._states(earlier))
        return [view(states[one.record.id]) for one in accepted]

    # read

    async def get(self, tenant: str, job_id: str, wait_s: float = 0.0, sees: Sees = _all) -> dict[str, Any]:
        """Return the job object; with ``wait_s``, once the job has finished or after that many seconds.

        Raises:
            JobNotFound: it does not exist, is another tenant's, or is of a model that the caller may not
                use.
        """
        (found,) = await self.get_many(tenant, [job_id], wait_s, sees)
        return found

    async def get_many(self, tenant: str, ids: Sequence[str], wait_s: float, sees: Sees = _all) -> list[dict[str, Any]]:
        """Return job objects in the order of ``ids``; with ``wait_s``, once all of them have finished."""
        patience = RetryDeadline(self._bus)
        ordered = await patience.until_done(lambda: self._visible(tenant, ids, sees))
        states = await patience.until_done(lambda: self._states(ordered))
        if wait_s > 0 and not all(state.ended for state in states.values()):
            await self._wait(states, wait_s)
            states = await RetryDeadline(self._bus).until_done(lambda: self._states(ordered))
        return [view(states[record.id]) for record in ordered]

    async def _visible(self, tenant: str, ids: Sequence[str], sees: Sees) -> list[JobRecord]:
        """Return the records of jobs, all of which must be visible to the caller."""
        records = await self._records.find(ids)
        for job_id in ids:
            record = records.get(JobId(job_id))
            if record is None or record.tenant != tenant or not sees(record.model):
                error = JobNotFound(f"there is no job '{job_id[:64]}'", field="id")
                error.hidden = record is not None
                raise error
        return [records[JobId(job_id)] for job_id in ids]

    async def _wait(self, states: dict[JobId, JobSnapshot], wait_s: float) -> None:
        """Wait for results. A message only triggers a read, because the stream may have rejected it."""
        result_seen = asyncio.Event()

        async def arrived(_: object) -> None:
            result_seen.set()

        end, pause = self._bus.clock.monotonic() + wait_s, _POLL_S
        open_ids = [job_id for job_id, state in states.items() if not state.ended]
        async with AsyncExitStack() as stack:
            for job_id in open_ids:
                subject = self._bus.names.result(job_id, states[job_id].record.pool)
                subscription = await self._bus.subscribe(subject, arrived, confirmed=False)
                stack.push_async_callback(subscription.unsubscribe)
            while open_ids and (left := end - self._bus.clock.monotonic()) > 0:
                result_seen.clear()
                open_ids = await self._still_open(open_ids, states)
                if open_ids:
                    try:
                        async with asyncio.timeout(min(left, pause)):
                            await result_seen.wait()
                        pause = _SOON_S
                        await asyncio.sleep(_GATHER_S if len(open_ids) > 1 else 0)
                    except TimeoutError:
                        pause = min(_POLL_S, 2 * pause)

    async def _still_open(self, ids: list[JobId], states: dict[JobId, JobSnapshot]) -> list[JobId]:
        ended = set[str]()
        try:
            for some in _few(ids):
                ended.update(await self._stored([states[job].record for job in some]))
        except BrokerUnavailable:
            return ids  # keep waiting: the broker may come back in time
        now = self._bus.clock.utc()
        return [job for job in ids if job not in ended and states[job].record.deadline + STORED_S > now]

    async def list(self, tenant: str, *, state: str, model: str, limit: int, cursor: str, sees: Sees = _all) -> Page:
        """List a tenant's jobs of models that the caller may use, newest first; also return the next page's
        cursor.

        The cursor is None on the last page.

        Raises:
            InvalidRequest: the cursor is not one of an earlier page.
        """
        asked = ListQuery(tenant, state, lambda name: model in ("", name) and sees(name), limit, before(cursor))
        return await RetryDeadline(self._bus).until_done(lambda: self._list.page(asked))

    # cancel

    async def cancel(self, tenant: str, job_id: str, sees: Sees = _all) -> dict[str, Any]:
        """Cancel an unfinished job and notify workers that run it.

        Raises:
            JobNotFound: as :meth:`get`.
            ResultConflict: it had already finished.
        """
        shown = await self.get(tenant, job_id, sees=sees)
        failure = Failure(JobCancelled.code, "the job was cancelled")
        (record,) = await RetryDeadline(self._bus).until_done(lambda: self._visible(tenant, [job_id], sees))
        if not await self._ends.end(record, JobState.CANCELLED, failure, int(shown["attempts"])):
            shown = await self.get(tenant, job_id)
            raise ResultConflict(f"job '{job_id}' has already finished: {shown['state']}", field="id")
        lane = Lane(LaneKind.INFER, record.model, record.version, self._bus.settings.region, record.pool)
        self._withdrawals.add(lane, record.id, min(record.deadline, self._bus.clock.utc() + CANCELLATION_TOLD_S))
        return await self.get(tenant, job_id)

    # states

    async def _states(self, records: Sequence[JobRecord], room: OutputRoom | None = None) -> dict[JobId, JobSnapshot]:
        """Return the snapshot of each job; expire those past their deadline without a result.

        Outputs that exceed ``room`` are omitted.
        """
        room, found = room or OutputRoom(), dict[JobId, JobSnapshot]()
        for some in _few(records):
            found.update(await self._some(some, room))
        return found

    async def _some(self, records: Sequence[JobRecord], room: OutputRoom) -> dict[JobId, JobSnapshot]:
        outcomes = await self._outcomes(records)
        now = self._bus.clock.utc()
        late = [record for record in records if record.id not in outcomes and record.deadline + STORED_S < now]
        if late:
            failure = Failure(DeadlineExceeded.code, "the deadline passed before the job finished")
            await asyncio.gather(*[self._ends.end(record, JobState.EXPIRED, failure, 0) for record in late])
            outcomes.update(await self._outcomes(late))
        notes = await self._notes([record for record in records if record.id not in outcomes])
        return {
            record.id: await self._state(record, outcomes.get(record.id), notes.get(record.id), room)
            for record in records
        }

    async def _state(
        self, record: JobRecord, outcome: Outcome | None, note: AttemptNote | None, room: OutputRoom
    ) -> JobSnapshot:
        if outcome is None or not outcome.outputs:
            return JobSnapshot(record, outcome, note)
        if not room.takes(outcome):
            return JobSnapshot(record, msgspec.structs.replace(outcome, outputs=()), note, left_out=True)
        return JobSnapshot(record, outcome, note, await self._large.job_outputs(record.tenant, outcome.outputs) or b"")

    async def _outcomes(self, records: Sequence[JobRecord]) -> dict[JobId, Outcome]:
        stored = await self._stored(records)
        found: dict[JobId, Outcome] = {}
        for record in records:
            end = stored.get(record.id)
            outcome = None if end is None else read_outcome(self._bus, record, end.data)
            if end is not None and outcome is not None:
                counts = as_it_counts(outcome, record.deadline, end.stored_at)
                found[record.id] = await self._seals.keyring.open_outcome(record.tenant, counts)
        return found

    async def _stored(self, records: Sequence[JobRecord]) -> dict[str, StoredMessage]:
        """Read the outcomes of jobs, each from the results stream of its record's pool."""
        by_pool: dict[str, list[JobId]] = {}
        for record in records:
            by_pool.setdefault(record.pool, []).append(record.id)
        found = await asyncio.gather(*[self._results.stored(ids, pool=pool) for pool, ids in by_pool.items()])
        return {job: end for ends in found for job, end in ends.items()}

    async def _notes(self, records: Sequence[JobRecord]) -> dict[JobId, AttemptNote]:
        """Return the last attempt of each job; its own note takes precedence over its bundle's."""
        if not records:
            return {}
        bucket, key = self._attempts, self._bus.names.attempt_key
        keys = {bucket.subject(key(of, item.pool)): of for item in records for of in (item.bundle, item.id) if of}
        stored = await self._bus.direct_batch(bucket.stream, list(keys))
        notes: dict[str, AttemptNote] = {}
        for subject, item in stored.items():
            envelope = self._bus.verify_frame(item.data, subject, MessageType.ATTEMPT) if item.data else None
            if envelope is not None:
                notes[keys[subject]] = codec.decode_note(envelope.body)
        found = {record.id: notes.get(record.id) or notes.get(record.bundle) for record in records}
        return {job: note for job, note in found.items() if note is not None}
