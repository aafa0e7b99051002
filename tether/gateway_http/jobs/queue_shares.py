"""Limits each tenant's share of the job queues and of the job records to a multiple of their free space.

A tenant of weight 1 may have four times as many bytes waiting in a lane stream as the stream has free
(:func:`tether.streams.usage.tenant_limit`). One that never stops sending reaches four fifths of the stream,
two reach 44 % each, and so on: a later tenant always finds room, and no share is reserved for an idle one. A
tenant may fill the stream if no other tenant has a key or a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.errors import QuotaExceeded
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.jobs.open_job_counter import OpenJobCounter
from tether.streams.usage import StreamUses, tenant_limit

RECORD_BYTES = 600
"""Approximate size of an open job's record; many small jobs fill the records before they fill a queue."""

FRESH_S = 0.5
"""Seconds for which a count of a tenant's open jobs is reused; jobs accepted here meanwhile are added."""


@dataclass
class _Usage:
    """``waiting``: bytes of a tenant's open jobs by lane stream, and of their records."""

    until: float
    waiting: dict[str, int] = field(default_factory=dict)


class JobShares:
    """The shares as one gateway sees them. ``shared`` returns True if there is any other tenant."""

    def __init__(self, bus: Bus, uses: StreamUses, tenants: Tenants, shared: Callable[[str], bool]) -> None:
        self._clock = bus.clock
        self._uses = uses
        self._records = bus.names.bucket_stream("jobs")
        self._tenants = tenants
        self._shared = shared
        self._open = OpenJobCounter(bus)
        self._usages: dict[str, _Usage] = {}

    async def require(self, tenant: str, jobs: int, lanes: Mapping[str, int]) -> None:
        """Check that a tenant's share has room for ``jobs`` more records, and for the bytes in each lane
        stream.

        Open jobs are counted only while a stream is full enough for some tenant to exceed its share.

        Raises:
            QuotaExceeded: there is no room; nothing was stored.
            BrokerUnavailable: the usage is unknown.
        """
        wanted = {**lanes, self._records: jobs * RECORD_BYTES}
        tight = {stream: limit for stream in wanted if (limit := await self._limit(tenant, stream)) is not None}
        if not tight or not self._shared(tenant):
            if self._usages.pop(tenant, None) is not None:
                self._open.forget(tenant)
            return
        waiting = (await self._refresh(tenant)).waiting
        for stream, limit in tight.items():
            has = waiting.get(stream, 0)
            if has + wanted[stream] > limit:
                what = (
                    "records of open durable jobs in a store"
                    if stream == self._records
                    else "durable jobs waiting in a queue"
                )
                raise QuotaExceeded(
                    f"tenant '{tenant}' has {has} bytes of {what}, "
                    f"which now has room for {limit} bytes of one tenant; wait for "
                    "jobs to finish, add workers, or raise max_file_mb or the tenant's weight",
                    field="max_file_mb",
                    retry_after=5.0,
                )
        for stream, more in wanted.items():
            waiting[stream] = waiting.get(stream, 0) + more

    async def _limit(self, tenant: str, stream: str) -> int | None:
        """Return the tenant's limit in a stream, in bytes; None if everything in the stream is below it."""
        use = await self._uses.of(stream)
        return None if use is None else tenant_limit(use, self._tenants.weight(tenant))

    async def _refresh(self, tenant: str) -> _Usage:
        found = self._usages.get(tenant)
        if found is None or self._clock.monotonic() >= found.until:
            await self._open.look(tenant, enough=0)
            waiting = {**self._open.waiting(tenant), self._records: self._open.known(tenant) * RECORD_BYTES}
            found = _Usage(self._clock.monotonic() + FRESH_S, waiting)
            self._usages[tenant] = found
        return found
