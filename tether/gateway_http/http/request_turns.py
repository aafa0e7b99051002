"""Schedules the start and the reply of requests fairly between tenants, a few in each pass of the event loop.

Lanes are fair already, but a request costs event-loop time before it is queued: reading, checking, signing. A
thousand requests that arrive together would otherwise delay all later ones, and so would the replies of a
bundle, which arrive together as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tether.gateway_http.fair_queue import FairQueue

IN_A_PASS = 8
"""Requests that start in one pass of the event loop: about a millisecond of work."""

SHARED_PASS = 2
"""The same while tenants share a gateway, and the number of replies in a pass. A request takes about seven
passes from arrival to reply, and in each it waits for the work of others."""

SHARED_S = 1.0
"""Seconds for which a gateway counts as shared after the tenant of its requests changed."""


class RequestTurns:
    """Fair turns of requests, taken after authentication and again when answered; ``weight`` is a tenant's
    share."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._starting = _Passes(weight)
        self._answered = _Passes(weight, SHARED_PASS)
        self._tenant: str | None = None
        self._last_shared_at = -SHARED_S

    async def enter(self, tenant: str, size: int = 0) -> None:
        """Wait until a request of ``size`` bytes may start."""
        if tenant != self._tenant:
            self._last_shared_at = self._last_shared_at if self._tenant is None else asyncio.get_running_loop().time()
            self._tenant = tenant
        self._starting.most = SHARED_PASS if self._shared else IN_A_PASS
        await self._starting.turn(tenant, size)

    async def answered(self, tenant: str) -> None:
        """Wait until an answered request may continue; return at once while only one tenant is active."""
        if self._shared:
            await self._answered.turn(tenant)

    @property
    def _shared(self) -> bool:
        return asyncio.get_running_loop().time() - self._last_shared_at < SHARED_S


class _Passes:
    """Turns in the passes of the event loop, ``most`` in each."""

    def __init__(self, weight: Callable[[str], float], most: int = IN_A_PASS) -> None:
        self.most = most
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(weight)
        self._started = 0
        """Turns given in this pass."""

    async def turn(self, tenant: str, size: int = 0) -> None:
        loop = asyncio.get_running_loop()
        if not self._started:
            loop.call_soon(self._pass)
        if self._started < self.most:
            self._started += 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.add(tenant, turn, size)
        await turn

    def _pass(self) -> None:
        """Start another pass; give its turns to waiting requests first, fairly by tenant."""
        taken = self._waiting.take(self.most, 1 << 62, lambda turn: not turn.done())
        for turn in taken:
            turn.set_result(None)
        self._started = len(taken)
        if taken:
            asyncio.get_running_loop().call_soon(self._pass)
