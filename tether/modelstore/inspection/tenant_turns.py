"""Whose model is looked at next, when more are pushed than are looked at side by side.

Each tenant has one seat at most, and tenants take turns. A tenant whose look took long is slow for a while: slow tenants together
leave one seat to the others, so that models made to use up their time keep no other tenant's push waiting for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tether.errors import Unavailable

MOST_WAITING = 8
"""Pushes of one tenant that wait for their turn; one more is told to come again."""

SLOW_S = 15.0
"""A tenant whose look takes this long is slow."""

SLOW_FOR_S = 600.0
"""For how long after that look."""


class InspectionTurns:
    """``seats``: how many models are looked at side by side; ``now`` is monotonic seconds."""

    def __init__(self, seats: int, now: Callable[[], float]) -> None:
        self._seats = seats
        self._now = now
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By tenant; the first tenant that may have a seat is next."""
        self._began: dict[str, float] = {}
        """When the look of each tenant in a seat began."""
        self._slow_until: dict[str, float] = {}

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Hold a seat while the block runs.

        Raises:
            Unavailable: too many pushes of the tenant wait.
        """
        waiting = self._waiting.setdefault(tenant, deque())
        if len(waiting) >= MOST_WAITING:
            raise Unavailable(
                f"{MOST_WAITING} pushes of tenant '{tenant}' wait to be looked at, one after another; push again later",
                retry_after=5,
            )
        given = asyncio.get_running_loop().create_future()
        waiting.append(given)
        self._give()
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._leave(tenant)
            raise
        try:
            yield
        finally:
            self._leave(tenant)

    def _leave(self, tenant: str) -> None:
        now = self._now()
        if now - self._began.pop(tenant) >= SLOW_S:
            self._slow_until[tenant] = now + SLOW_FOR_S
        self._slow_until = {name: until for name, until in self._slow_until.items() if until > now}
        self._give()

    def _give(self) -> None:
        for tenant in list(self._waiting):
            waiting = self._waiting[tenant]
            while waiting and waiting[0].cancelled():
                waiting.popleft()
            if waiting and self._may_have_one(tenant):
                self._began[tenant] = self._now()
                waiting.popleft().set_result(None)
                self._waiting[tenant] = self._waiting.pop(tenant)  # the others come first the next time
            if not waiting:
                del self._waiting[tenant]

    def _may_have_one(self, tenant: str) -> bool:
        if tenant in self._began or len(self._began) >= self._seats:
            return False
        return not self._is_slow(tenant) or sum(map(self._is_slow, self._began)) < self._seats - 1

    def _is_slow(self, tenant: str) -> bool:
        now = self._now()
        return self._slow_until.get(tenant, now) > now or now - self._began.get(tenant, now) >= SLOW_S
