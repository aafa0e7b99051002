"""How much of a queue of durable jobs, and of the records of jobs, one tenant may fill: a multiple of what is free there.

A tenant with the weight 1 may have four times as many bytes waiting in a lane stream as the stream has left
(:func:`tether.streams.usage.tenant_limit`). One that sends without end stops at four fifths of the stream, two at 44 % each, and so
on: there is room left for a tenant that comes later, however many jobs wait, and no share lies idle. Where no other tenant has a
key or a record, the stream is all of the one's that there is.
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
"""About what the record of an open job takes; many small jobs fill the records before they fill a queue."""

FRESH_S = 0.5
"""How long a look at a tenant's open jobs counts; what this gateway accepts meanwhile is added."""


@dataclass
class _Look:
    """``waiting``: bytes of a tenant's open jobs by lane stream, and of their records."""

    until: float
    waiting: dict[str, int] = field(default_factory=dict)


class JobShares:
    """The shares as one gateway sees them. ``shared``: whether there is another tenant than this one."""

    def __init__(self, bus: Bus, uses: StreamUses, tenants: Tenants, shared: Callable[[str], bool]) -> None:
        self._clock = bus.clock
        self._uses = uses
        self._records = bus.names.bucket_stream("jobs")
        self._tenants = tenants
        self._shared = shared
        self._open = OpenJobCounter(bus)
        self._looks: dict[str, _Look] = {}

    async def require(self, tenant: str, jobs: int, lanes: Mapping[str, int]) -> None:
        """Prove that a tenant's share of the records has room for so many jobs more, and that of each lane stream for so many bytes. Nothing is counted while a stream has so
        much room that nobody can be over a share.

        Raises:
            QuotaExceeded: there is none; nothing was stored.
            BrokerUnavailable: nobody can tell.
        """
        wanted = {**lanes, self._records: jobs * RECORD_BYTES}
        tight = {stream: limit for stream in wanted if (limit := await self._limit(tenant, stream)) is not None}
        if not tight or not self._shared(tenant):
            if self._looks.pop(tenant, None) is not None:
                self._open.forget(tenant)
            return
        waiting = (await self._look(tenant)).waiting
        for stream, limit in tight.items():
            has = waiting.get(stream, 0)
            if has + wanted[stream] > limit:
                what = (
                    "records of open durable jobs in a store"
                    if stream == self._records
                    else "durable jobs waiting in a queue"
                )
                raise QuotaExceeded(
                    f"tenant '{tenant}' has {has} bytes of {what} that has room for {limit} of one tenant just now; wait for "
                    "jobs to end, add workers, or raise max_file_mb or the tenant's weight",
                    field="max_file_mb",
                    retry_after=5.0,
                )
        for stream, more in wanted.items():
            waiting[stream] = waiting.get(stream, 0) + more

    async def _limit(self, tenant: str, stream: str) -> int | None:
        """Bytes that the tenant may have in a stream; None when even all that is in it are fewer."""
        use = await self._uses.of(stream)
        return None if use is None else tenant_limit(use, self._tenants.weight(tenant))

    async def _look(self, tenant: str) -> _Look:
        found = self._looks.get(tenant)
        if found is None or self._clock.monotonic() >= found.until:
            await self._open.look(tenant, enough=0)
            waiting = {**self._open.waiting(tenant), self._records: self._open.known(tenant) * RECORD_BYTES}
            found = _Look(self._clock.monotonic() + FRESH_S, waiting)
            self._looks[tenant] = found
        return found
