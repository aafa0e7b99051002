"""Durable jobs on their way into their lanes: many jobs, one message, one signature.

What arrives while a lane's last bundle is being stored travels together in the next one, in an order that is fair between
tenants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.bus.queue import BusQueue
from tether.envelope import MessageType
from tether.errors import BrokerUnavailable, TetherError
from tether.gateway_http.fair import FairQueue
from tether.job import Job, JobRecord, Lane, new_job_id
from tether.lifecycle import Tasks

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
"""How long an accepting gateway waits for a broker that is away, before it says so."""


class Submission(msgspec.Struct, frozen=True):
    """A job, the lane it goes to, and its record (whose ``bundle`` is filled in when it leaves)."""

    lane: Lane
    job: Job
    record: JobRecord
    digest: str = ""
    """Digest of the request as only this process knows it; the record has what may be stored."""


class Records:
    """The ``jobs`` bucket as gateways write it: a record whose ``bundle`` is empty was claimed and not yet accepted."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = SignedBucket(bus, "jobs", MessageType.RECORD)

    async def claim(self, record: JobRecord) -> bool:
        """Take the job's id, before anything is queued; False when it was taken already."""
        return await self._bucket.create(record.id, codec.encode_record(record), ttl_s=self._ttl_s(record))

    async def accept(self, record: JobRecord, bundle: str) -> None:
        body = codec.encode_record(msgspec.structs.replace(record, bundle=bundle))
        await self._bucket.put(record.id, body, ttl_s=self._ttl_s(record))

    def _ttl_s(self, record: JobRecord) -> int:
        left = max(0.0, record.deadline - self._bus.clock.utc())
        return int(left + self._bus.settings.result_ttl_s) + 1


_Waiting = tuple[Submission, "asyncio.Future[None]"]


class JobBundler:
    """The jobs of every lane that have not been stored yet."""

    def __init__(self, bus: Bus, tasks: Tasks, weight: Callable[[str], float]) -> None:
        self._bus = bus
        self._tasks = tasks
        self._weight = weight
        self._queue = BusQueue(bus)
        self._records = Records(bus)
        self._pending: dict[Lane, FairQueue[_Waiting]] = {}
        self._storing: set[Lane] = set()

    def add(self, item: Submission) -> asyncio.Future[None]:
        """Put a job on its way; the future is done when the broker holds it, or has the reason why it does not."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
                batch = waiting.take(self._bus.settings.bundle_max_jobs, limit, _any)
                try:
                    await self._store(lane, [item for item, _ in batch])
                except TetherError as error:
                    _settle(batch, error)
                except Exception:
                    log.exception("jobs were not stored", extra={"action": "store_failed", "model": lane.model})
                    _settle(batch, TetherError("the gateway could not store the job; its log has the reason"))
                else:
                    _settle(batch, None)
        finally:
            self._storing.discard(lane)

    async def _store(self, lane: Lane, items: Sequence[Submission]) -> None:
        """The bundle first: a lane that is full leaves no record of a job that was refused. Repeating is harmless."""
        message_id = new_job_id()
        subject = self._bus.names.lane(lane)
        jobs = [item.job for item in items]
        frame = self._bus.signer.seal(
            MessageType.JOB,
            subject,
            codec.encode_jobs(jobs),
            message_id=message_id,
            jobs=tuple(job.id for job in jobs),
            attempt=1,
            tenant=lane.tenant,
        )
        metrics.BUNDLE_JOBS.labels(lane.kind.value).observe(len(jobs))
        end = self._bus.clock.monotonic() + _PATIENCE_S
        while True:
            try:
                await self._store_once(lane, frame, message_id, items)
                return
            except BrokerUnavailable:
                if self._bus.clock.monotonic() >= end:
                    raise
                await self._bus.wait_connected(1.0)
                await asyncio.sleep(0.05)

    async def _store_once(self, lane: Lane, frame: bytes, message_id: str, items: Sequence[Submission]) -> None:
        await self._queue.enqueue(lane, frame, message_id=message_id, ttl_s=None, timeout=5.0)
        accepted = [self._records.accept(item.record, message_id) for item in items]
        for result in await asyncio.gather(*accepted, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


def _any(_: _Waiting) -> bool:
    """A durable job is stored also when its client has left."""
    return True


def _settle(batch: Sequence[_Waiting], error: TetherError | None) -> None:
    for _, future in batch:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
