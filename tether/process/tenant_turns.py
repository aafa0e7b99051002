"""Shares seats fairly between tenants if more work waits than there are seats.

A tenant has a limited number of seats, and tenants take turns. A tenant whose work took long counts as slow
for a while: slow tenants together leave one seat to the others, so that work made to run long delays no other
tenant.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain

from tether.errors import Unavailable

SLOW_S = 15.0
"""Seconds of work after which a tenant is slow."""

SLOW_FOR_S = 600.0
"""Seconds that a tenant stays slow."""


class TenantTurns:
    """Assigns ``seats`` seats, at most ``each`` to one tenant; ``now`` is monotonic seconds.

    ``most_waiting``: pushes of one tenant that may wait; more are refused (0: unlimited).
    """

    def __init__(self, seats: int, now: Callable[[], float], *, each: int = 1, most_waiting: int = 0) -> None:
        self._seats, self._each, self._most_waiting = seats, each, most_waiting
        self._now = now
        self._waiting: dict[str, deque[asyncio.Future[float]]] = {}
        """Waiting work by tenant; the first tenant that may have a seat is next."""
        self._began: dict[str, deque[float]] = {}
        """When the work of each seated tenant began, oldest first."""
        self._slow_until: dict[str, float] = {}

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a seat and occupy it while the block runs.

        Raises:
            Unavailable: too many pushes of the tenant wait.
        """
        waiting = self._waiting.setdefault(tenant, deque())
        if self._most_waiting and len(waiting) >= self._most_waiting:
            raise Unavailable(
                f"{len(waiting)} pushes of tenant '{tenant}' wait already; push again later",
                retry_after=5,
            )
        given: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        waiting.append(given)
        self._give()
        try:
            began = await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._leave(tenant, given.result())
            raise
        try:
            yield
        finally:
            self._leave(tenant, began)

    def _leave(self, tenant: str, began: float) -> None:
        now = self._now()
        sitting = self._began[tenant]
        sitting.remove(began)
        if not sitting:
            del self._began[tenant]
        if now - began >= SLOW_S:
            self._slow_until[tenant] = now + SLOW_FOR_S
        self._slow_until = {name: until for name, until in self._slow_until.items() if until > now}
        self._give()

    def _give(self) -> None:
        for tenant in list(self._waiting):
            waiting = self._waiting[tenant]
            while waiting and waiting[0].cancelled():
                waiting.popleft()
            if waiting and self._may_have_one(tenant):
                now = self._now()
                self._began.setdefault(tenant, deque()).append(now)
                waiting.popleft().set_result(now)
                self._waiting[tenant] = self._waiting.pop(tenant)  # other tenants go first the next time
            if not waiting:
                del self._waiting[tenant]

    def _may_have_one(self, tenant: str) -> bool:
        if len(self._began.get(tenant, ())) >= self._each or sum(map(len, self._began.values())) >= self._seats:
            return False
        if not self._is_slow(tenant):
            return True
        slow = chain.from_iterable(sitting for name, sitting in self._began.items() if self._is_slow(name))
        return len(list(slow)) < self._seats - 1

    def _is_slow(self, tenant: str) -> bool:
        now = self._now()
        sitting = self._began.get(tenant)
        return self._slow_until.get(tenant, now) > now or (sitting is not None and now - sitting[0] >= SLOW_S)
