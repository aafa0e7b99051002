"""Sends durable jobs to their lanes: many jobs, one message, one signature.

Jobs that arrive while a lane's last bundle is being stored share the next one, in an order that is fair
between tenants. Records are stored first (:mod:`tether.gateway_http.jobs.records`), so that a job without
room for its record is never queued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from tether.bus.bus import Bus
from tether.bus.retry import RetryDeadline
from tether.crypto import MessageType
from tether.domain.job import Job, JobRecord, Lane, new_job_id
from tether.domain.worker_protocol import BUNDLE_S
from tether.errors import BrokerUnavailable, QueueFull, TetherError
from tether.gateway_http.fair_queue import FairQueue
from tether.gateway_http.jobs.records import Entered, JobRecordStore
from tether.gateway_http.jobs.store_room import JobStores
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.streams.job_queue import BusQueue
from tether.wire import codec

log = logging.getLogger(__name__)

T = TypeVar("T")


class Submission(msgspec.Struct, frozen=True):
    """A job, its lane and its record, whose ``bundle`` is set when it is sent."""

    lane: Lane
    job: Job
    record: JobRecord
    digest: str = ""
    """Digest of the request, known to this process only; the record has the one that may be stored."""
    key: str = ""
    """Digest of its Idempotency-Key; empty without one."""
    after: int = 0
    """Sequence of the key's current entry."""


_Waiting = tuple[Submission, "asyncio.Future[Entered | None]"]


class JobBundler:
    """The jobs of all lanes that are not stored yet."""

    def __init__(
        self,
        bus: Bus,
        tasks: Tasks,
        weight: Callable[[str], float],
        records: JobRecordStore,
        *,
        stores: JobStores,
        job_s: Callable[[Lane], float],
    ) -> None:
        self._bus = bus
        self._tasks = tasks
        self._weight = weight
        self._queue = BusQueue(bus)
        self._records = records
        self._stores = stores
        self._job_s = job_s
        self._pending: dict[Lane, FairQueue[_Waiting]] = {}
        self._storing: set[Lane] = set()

    def add(self, item: Submission) -> asyncio.Future[Entered | None]:
        """Queue a job for its lane.

        The future resolves to its record once the broker has stored both, or to None if another request took
        its Idempotency-Key first; it fails if the job was not stored.
        """
        future: asyncio.Future[Entered | None] = asyncio.get_running_loop().create_future()
        pending = self._pending.get(item.lane)
        if pending is None:
            pending = self._pending[item.lane] = FairQueue(self._weight)
        pending.add(item.job.tenant, (item, future), item.job.size)
        if item.lane not in self._storing:
            self._storing.add(item.lane)
            self._tasks.spawn(self._store_all(item.lane), "store-jobs")
        return future

    async def _store_all(self, lane: Lane) -> None:
        try:
            while waiting := self._pending.get(lane):
                limit = min(self._bus.settings.max_body_bytes, self._bus.room)
                batch = waiting.take(self._most(lane), limit, _any)
                try:
                    stored = await self._store(lane, [item for item, _ in batch])
                except TetherError as error:
                    _settle(batch, error)
                except Exception:
                    log.exception("jobs not stored", extra={"action": "store_failed", "model": lane.model})
                    _settle(batch, TetherError("internal error: the gateway could not store the job; see its log"))
                else:
                    _settle(batch, stored)
        finally:
            self._storing.discard(lane)

    def _most(self, lane: Lane) -> int:
        """Return the jobs of one bundle. A single worker gets all of them, so they are few enough to run
        quickly."""
        most, job_s = self._bus.settings.bundle_max_jobs, self._job_s(lane)
        return max(1, min(most, int(BUNDLE_S / job_s))) if job_s > 0 else most

    async def _store(self, lane: Lane, items: Sequence[Submission]) -> list[Entered | None]:
        """Store the records, then the bundle, then turn claims into records; each step is idempotent."""
        bundle, patience = new_job_id(), RetryDeadline(self._bus)
        entered = await self._enter(items, bundle, patience)
        jobs = [item.job for item, record in zip(items, entered, strict=True) if record is not None]
        if not jobs:
            return entered
        try:
            await self._enqueue(lane, jobs, bundle, patience)
        except BrokerUnavailable:
            raise  # it may be queued all the same
        except Exception:
            await self._records.discard([record for record in entered if record is not None])
            raise
        return await _all([self._accepted(record, patience) for record in entered])

    async def _enter(self, items: Sequence[Submission], bundle: str, patience: RetryDeadline) -> list[Entered | None]:
        """Store the records of a bundle: all of them, or none if one finds no room."""
        steps = [patience.until_done(partial(self._enter_one, item, bundle)) for item in items]
        entered = await asyncio.gather(*steps, return_exceptions=True)
        errors = [one for one in entered if isinstance(one, BaseException)]
        refused = [error for error in errors if not isinstance(error, BrokerUnavailable)]
        if refused:
            await self._records.discard([one for one in entered if isinstance(one, Entered)])
        if errors:
            raise [*refused, *errors][0]
        return [one for one in entered if not isinstance(one, BaseException)]

    async def _accepted(self, entered: Entered | None, patience: RetryDeadline) -> Entered | None:
        if entered is None or not entered.record.storing:
            return entered
        claim = entered.record
        return await patience.until_done(lambda: self._records.accept(claim))

    async def _enter_one(self, item: Submission, bundle: str) -> Entered | None:
        try:
            return await self._stores.until_room(partial(self._put, item, bundle))
        except QueueFull as full:
            raise self._stores.records_full() from full

    async def _put(self, item: Submission, bundle: str) -> Entered | None:
        if item.key:
            return await self._records.claim(item.record, bundle, item.after)
        return await self._records.enter(item.record, bundle)

    async def _enqueue(self, lane: Lane, jobs: Sequence[Job], bundle: str, patience: RetryDeadline) -> None:
        frame = self._bus.signer.sign_envelope(
            MessageType.JOB,
            self._bus.names.lane(lane),
            codec.encode_jobs(jobs),
            message_id=bundle,
            jobs=tuple(job.id for job in jobs),
            attempt=1,
            tenant=lane.tenant,
        )
        metrics.BUNDLE_JOBS.labels(lane.kind.value).observe(len(jobs))
        queue = partial(self._queue.enqueue, lane, frame, message_id=bundle, ttl_s=None, timeout=5.0)
        try:
            await patience.until_done(queue)
        except QueueFull as full:
            raise self._stores.queue_full() from full


async def _all(steps: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all steps, and only then raise the first error."""
    found = []
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


def _any(_: _Waiting) -> bool:
    """Return True: a durable job is stored even if its client has left."""
    return True


def _settle(batch: Sequence[_Waiting], ended: TetherError | Sequence[Entered | None]) -> None:
    for position, (_, future) in enumerate(batch):
        if future.done():
            continue
        if isinstance(ended, TetherError):
            future.set_exception(ended)
        else:
            future.set_result(ended[position])
