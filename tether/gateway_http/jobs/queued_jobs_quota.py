"""The quota ``queued_jobs``: a tenant's maximum of open durable jobs, over all gateways.

A gateway counts records and results (:mod:`tether.gateway_http.jobs.open_job_counter`) and then accepts an
eighth of the free room before it counts again, and only after those jobs are stored, so that other gateways
see them. Thus up to eight gateways stay within the quota, except for one request of each other gateway that
is stored at the same moment when little room is left.
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
"""Seconds for which a count is reused."""

AGAIN_S = 0.2
"""Seconds for which the last count is reused after a rejection."""

_PART = 8


@dataclass
class _Gate:
    """One tenant's admission state. Times are monotonic seconds."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    stored: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no admitted job is being stored."""
    storing: int = 0
    allowance: int = 0
    """Jobs that may be admitted without another count."""
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
    """Admits durable jobs. Tenants without a quota are not counted."""

    def __init__(self, bus: Bus, tenants: Tenants) -> None:
        self._clock = bus.clock
        self._tenants = tenants
        self._gates: dict[str, _Gate] = {}
        self.open = OpenJobCounter(bus)

    @asynccontextmanager
    async def hold(self, tenant: str, records: Sequence[JobRecord]) -> AsyncIterator[None]:
        """Count jobs as open while the block accepts them, and afterwards unless it fails.

        Raises:
            QuotaExceeded: there is no room for all of them.
            BrokerUnavailable: the count is unknown.
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
        """Admit jobs; return the sequence up to which records were read."""
        jobs = len(records)
        if not self._admit_from_allowance(gate, tenant, jobs, limit):
            async with gate.turn:
                if not self._admit_from_allowance(gate, tenant, jobs, limit):
                    await gate.stored.wait()
                    await self._recount(gate, tenant, jobs, limit)
                return self._let_in(gate, tenant, records)
        return self._let_in(gate, tenant, records)

    def _let_in(self, gate: _Gate, tenant: str, records: Sequence[JobRecord]) -> int:
        gate.enter(len(records))
        self.open.accepted(tenant, records)
        return self.open.seen(tenant)

    def _admit_from_allowance(self, gate: _Gate, tenant: str, jobs: int, limit: int) -> bool:
        """Return True if the last count admits the jobs; reject them if it has just shown that there is no
        room."""
        now, use = self._clock.monotonic(), self.open.known(tenant)
        if use + jobs > limit and now < gate.full_until:
            raise _exceeded(tenant, use, limit)
        if now >= gate.fresh_until or jobs > gate.allowance or use + jobs > limit:
            return False
        gate.allowance -= jobs
        return True

    async def _recount(self, gate: _Gate, tenant: str, jobs: int, limit: int) -> None:
        await self.open.look(tenant, enough=max(0, limit - jobs))
        now, use = self._clock.monotonic(), self.open.known(tenant)
        room = limit - use - jobs
        gate.allowance, gate.fresh_until = max(0, room) // _PART, now + FRESH_S
        if room < 0:
            gate.full_until = now + AGAIN_S
            raise _exceeded(tenant, use, limit)


def _exceeded(tenant: str, use: int, limit: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant '{tenant}' has {use} unfinished durable jobs; its quota queued_jobs is {limit}",
        field="queued_jobs",
    )
