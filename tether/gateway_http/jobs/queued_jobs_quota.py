"""The quota ``queued_jobs``: how many durable jobs of a tenant may be open, over all gateways.

A gateway looks at the records and results (:mod:`tether.gateway_http.jobs.open_job_counter`), and then accepts an eighth of the room it
saw before it looks again, and only after what it accepted is stored, so that the others see it. So up to eight gateways
accept no more than the quota, but for one request of each other gateway that is stored in the same moment when there is
little room left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.domain.job import JobRecord
from tether.errors import QuotaExceeded
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.jobs.open_job_counter import OpenJobCounter

FRESH_S = 1.0
"""How long the room that was seen counts."""

AGAIN_S = 0.2
"""After a refusal the last look counts for this long."""

_PART = 8


@dataclass
class _Gate:
    """One tenant's way in. Times are monotonic seconds."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    stored: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing that was let in is on its way."""
    storing: int = 0
    allowance: int = 0
    """Jobs that may be let in without another look."""
    fresh_until: float = 0.0
    full_until: float = 0.0

    def enter(self, jobs: int) -> None:
        self.storing += jobs
        self.stored.clear()

    def leave(self, jobs: int) -> None:
        self.storing -= jobs
        if not self.storing:
            self.stored.set()


class QueuedJobsQuota:
    """Where there is no quota, nothing is counted."""

    def __init__(self, bus: Bus, tenants: Tenants) -> None:
        self._clock = bus.clock
        self._tenants = tenants
        self._gates: dict[str, _Gate] = {}
        self.open = OpenJobCounter(bus)

    @asynccontextmanager
    async def hold(self, tenant: str, records: Sequence[JobRecord]) -> AsyncIterator[None]:
        """Count jobs as open while the block accepts them, and from then on unless it fails.

        Raises:
            QuotaExceeded: there is no room for all of them.
            BrokerUnavailable: nobody can tell.
        """
        found = self._tenants.find(tenant)
        limit = 0 if found is None else found.quotas.queued_jobs
        if not limit or not records:
            if not limit and self._gates.pop(tenant, None) is not None:
                self.open.forget(tenant)
            yield
            return
        gate = self._gates.get(tenant)
        if gate is None:
            gate = self._gates[tenant] = _Gate()
            gate.stored.set()
        seen = await self._admit(gate, tenant, records, limit)
        try:
            yield
        except BaseException:
            self.open.take_back(tenant, records, seen)
            raise
        finally:
            gate.leave(len(records))

    async def _admit(self, gate: _Gate, tenant: str, records: Sequence[JobRecord], limit: int) -> int:
        """Let jobs in; how far the records were read by then."""
        jobs = len(records)
        if not self._at_once(gate, tenant, jobs, limit):
            async with gate.turn:
                if not self._at_once(gate, tenant, jobs, limit):
                    await gate.stored.wait()
                    await self._look(gate, tenant, jobs, limit)
                return self._let_in(gate, tenant, records)
        return self._let_in(gate, tenant, records)

    def _let_in(self, gate: _Gate, tenant: str, records: Sequence[JobRecord]) -> int:
        gate.enter(len(records))
        self.open.accepted(tenant, records)
        return self.open.seen(tenant)

    def _at_once(self, gate: _Gate, tenant: str, jobs: int, limit: int) -> bool:
        """Whether the last look lets them in; when it has just shown that there is no room, they are refused."""
        now, use = self._clock.monotonic(), self.open.known(tenant)
        if use + jobs > limit and now < gate.full_until:
            raise _exceeded(tenant, use, limit)
        if now >= gate.fresh_until or jobs > gate.allowance or use + jobs > limit:
            return False
        gate.allowance -= jobs
        return True

    async def _look(self, gate: _Gate, tenant: str, jobs: int, limit: int) -> None:
        await self.open.look(tenant, enough=max(0, limit - jobs))
        now, use = self._clock.monotonic(), self.open.known(tenant)
        room = limit - use - jobs
        gate.allowance, gate.fresh_until = max(0, room) // _PART, now + FRESH_S
        if room < 0:
            gate.full_until = now + AGAIN_S
            raise _exceeded(tenant, use, limit)


def _exceeded(tenant: str, use: int, limit: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant '{tenant}' has {use} durable jobs that have not ended; its quota queued_jobs is {limit}",
        field="queued_jobs",
    )
