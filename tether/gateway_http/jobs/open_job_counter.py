"""Which durable jobs of a tenant were accepted and have not ended, counted from their records and results.

Nothing is written for the count. A gateway reads the records that came since it last looked, whoever accepted them, and
forgets a job when its result is stored or its deadline is over. After a start, and after the broker was away, it begins
at the first record.
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
_AFTER_DEADLINE_S = 2.0
"""A result may still be on its way for this long after a job's deadline."""


@dataclass
class _Count:
    """One tenant's open jobs: when each of them has ended at the latest, in UTC seconds."""

    ends: dict[JobId, float] = field(default_factory=dict)
    pools: dict[JobId, str] = field(default_factory=dict)
    """Of those that are not in the shared pool."""
    lanes: dict[JobId, tuple[str, int]] = field(default_factory=dict)
    """The lane stream of each of them, and its bytes there."""
    seen: int = 0
    """The last record that was read, by its sequence."""
    seen_of_before: int = 0
    """The same of those that homes of before left."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    looks: int = 0
    """How many looks have begun."""


class OpenJobCounter:
    """Counts for the tenants that were asked about; no other tenant costs anything."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = JobRecordStore(bus)
        self._results = BusResults(bus)
        self._counts: dict[str, _Count] = {}
        bus.on_reconnect(self._begin_anew)

    def _begin_anew(self) -> None:
        for count in self._counts.values():
            count.seen = count.seen_of_before = 0

    def known(self, tenant: str) -> int:
        """How many there were when this gateway last looked, and those it accepted since."""
        count = self._counts.get(tenant)
        return 0 if count is None else len(count.ends)

    def waiting(self, tenant: str) -> dict[str, int]:
        """Bytes of the jobs that :meth:`known` counts, by lane stream."""
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
        """How far the records were read."""
        count = self._counts.get(tenant)
        return 0 if count is None else count.seen

    def take_back(self, tenant: str, records: Iterable[JobRecord], seen: int) -> None:
        """Forget jobs that were not accepted, or not for sure; the records after ``seen`` tell at the next look."""
        count = self._counts.get(tenant)
        if count is not None:
            for record in records:
                _forget(count, record.id)
            count.seen = min(count.seen, seen)

    def forget(self, tenant: str) -> None:
        """Follow a tenant's jobs no more."""
        self._counts.pop(tenant, None)

    async def count(self, tenant: str) -> int:
        """How many there are just now; a tenant that was not followed is not followed from now on either.

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
        """Take in the records that came since the last look, and when that makes more than ``enough`` open jobs, forget
        those that have ended; how many are open at most. Who asks while another look waits to begin shares it.

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
        """How far the records are read after this."""
        async for item in self._bus.direct_scan(self._records.raw.stream, subjects, start=seen + 1, batch=_BATCH):
            seen = item.sequence
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
        """Oldest first, and no more than is needed: each result is read once."""
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
