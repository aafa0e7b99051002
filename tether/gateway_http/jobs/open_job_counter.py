"""Counts a tenant's open durable jobs (accepted, no outcome yet) from their records and results.

Nothing is written for the count. A gateway reads the records since its last refresh, of all gateways, and
forgets a job when its result is stored or its deadline has passed. After a start or a reconnect it reads from
the first record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.domain.job import SHARED, JobId, JobRecord, Lane, LaneKind
from tether.gateway_http.jobs.records import JobRecordStore
from tether.streams.job_queue import BusResults

_BATCH = 512
_PAUSE_AFTER = 16
"""Records that are verified, some milliseconds of work, before other requests have a turn."""
_AFTER_DEADLINE_S = 2.0
"""Seconds after a job's deadline in which its result may still arrive."""


@dataclass
class _Count:
    """One tenant's open jobs, with the latest time at which each has finished (UTC seconds)."""

    ends: dict[JobId, float] = field(default_factory=dict)
    pools: dict[JobId, str] = field(default_factory=dict)
    """Pools of the jobs that are not in the shared pool."""
    lanes: dict[JobId, tuple[str, int]] = field(default_factory=dict)
    """The lane stream of each job, and its bytes there."""
    seen: int = 0
    """Sequence of the last record that was read."""
    seen_of_before: int = 0
    """The same for records of an older format."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    looks: int = 0
    """Number of refreshes started."""


class OpenJobCounter:
    """Counts for requested tenants only; other tenants cost nothing."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = JobRecordStore(bus)
        self._results = BusResults(bus)
        self._counts: dict[str, _Count] = {}
        bus.on_reconnect(self._restart)

    def _restart(self) -> None:
        for count in self._counts.values():
            count.seen = count.seen_of_before = 0

    def known(self, tenant: str) -> int:
        """Return the number at the last refresh, plus the jobs that this gateway accepted since."""
        count = self._counts.get(tenant)
        return 0 if count is None else len(count.ends)

    def waiting(self, tenant: str) -> dict[str, int]:
        """Return the bytes of the jobs that :meth:`known` counts, by lane stream."""
        count, found = self._counts.get(tenant), Counter[str]()
        for stream, size in () if count is None else count.lanes.values():
            found[stream] += size
        return found

    def accepted(self, tenant: str, records: Iterable[JobRecord]) -> None:
        """Count jobs that this gateway accepted."""
        count = self._counts.get(tenant)
        if count is not None:
            for record in records:
                self._add(count, record)

    def seen(self, tenant: str) -> int:
        """Return the sequence of the last record read."""
        count = self._counts.get(tenant)
        return 0 if count is None else count.seen

    def take_back(self, tenant: str, records: Iterable[JobRecord], seen: int) -> None:
        """Uncount jobs that were not, or not certainly, accepted; reread the records after ``seen`` next
        time."""
        count = self._counts.get(tenant)
        if count is not None:
            for record in records:
                _forget(count, record.id)
            count.seen = min(count.seen, seen)

    def forget(self, tenant: str) -> None:
        """Stop counting a tenant's jobs."""
        self._counts.pop(tenant, None)

    async def count(self, tenant: str) -> int:
        """Return the current number; does not keep counting a tenant that was not counted before.

        Raises:
            BrokerUnavailable: no answer.
        """
        followed = tenant in self._counts
        try:
            return await self.look(tenant, enough=0)
        finally:
            if not followed:
                self.forget(tenant)

    async def look(self, tenant: str, *, enough: int) -> int:
        """Read new records; if that makes more than ``enough`` open jobs, remove finished ones until it does
        not.

        Returns an upper bound of the open jobs. Calls that wait for the same refresh to start share it.

        Raises:
            BrokerUnavailable: no answer.
        """
        count = self._counts.setdefault(tenant, _Count())
        begun = count.looks
        async with count.lock:
            if count.looks == begun:
                count.looks += 1
                await self._read(count, tenant)
                await self._settle(count, enough)
        return len(count.ends)

    async def _read(self, count: _Count, tenant: str) -> None:
        count.seen = await self._read_from(count, tenant, self._records.subjects_of(tenant), count.seen)
        older = self._records.subjects_of_before
        count.seen_of_before = await self._read_from(count, tenant, older, count.seen_of_before)

    async def _read_from(self, count: _Count, tenant: str, subjects: str, seen: int) -> int:
        """Read records after ``seen``; return the sequence of the last one."""
        number = 0
        async for item in self._bus.direct_scan(self._records.raw.stream, subjects, start=seen + 1, batch=_BATCH):
            seen, number = item.sequence, number + 1
            if number % _PAUSE_AFTER == 0:
                await asyncio.sleep(0)
            record = self._records.opened(item.subject, item.data)
            if record is not None and record.id not in count.ends:
                self._take(count, tenant, record)
        return seen

    def _take(self, count: _Count, tenant: str, record: JobRecord) -> None:
        end = record.deadline + _AFTER_DEADLINE_S
        if record.tenant == tenant and record.bundle and end > self._bus.clock.utc():
            self._add(count, record)

    def _add(self, count: _Count, record: JobRecord) -> None:
        count.ends[record.id] = record.deadline + _AFTER_DEADLINE_S
        lane = Lane(LaneKind.JOB, record.model, record.version, pool=record.pool, priority=record.priority)
        count.lanes[record.id] = self._bus.names.lane_stream(lane), record.size
        if record.pool != SHARED:
            count.pools[record.id] = record.pool

    async def _settle(self, count: _Count, enough: int) -> None:
        """Remove finished jobs, oldest first and only as many as needed: each result costs a read."""
        now = self._bus.clock.utc()
        for job in [job for job, end in count.ends.items() if end <= now]:
            _forget(count, job)
        jobs = list(count.ends)
        for start in range(0, len(jobs), _BATCH):
            if len(count.ends) <= enough:
                return
            for ended in await self._ended(count, jobs[start : start + _BATCH]):
                _forget(count, JobId(ended))

    async def _ended(self, count: _Count, jobs: Sequence[JobId]) -> set[str]:
        by_pool: dict[str, list[JobId]] = {}
        for job in jobs:
            by_pool.setdefault(count.pools.get(job, SHARED), []).append(job)
        found = [await self._results.find(ids, pool=pool) for pool, ids in by_pool.items()]
        return {job for frames in found for job in frames}


def _forget(count: _Count, job: JobId) -> None:
    count.ends.pop(job, None)
    count.pools.pop(job, None)
    count.lanes.pop(job, None)
