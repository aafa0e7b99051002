"""Requests begin, and go on when they are answered, in turns by tenant, a few in each pass of the event loop: a flood waits behind itself.

What a request costs before it is in its lane's queue, which is fair already, is time of the event loop: reading, checking, signing.
A thousand requests that come together would all have theirs before the next one is looked at. The answers to a bundle come together
as well, and each of them is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tether.gateway_http.fair_queue import FairQueue

IN_A_PASS = 8
"""Requests that begin in one pass of the event loop: about a millisecond of work."""

SHARED_PASS = 2
"""The same while tenants share a gateway, and the answers that go on. A request takes seven passes or so from its coming to its answer,
and in each it waits for what others do in it."""

SHARED_S = 1.0
"""How long tenants share a gateway after a request of another one than the last."""


class RequestTurns:
    """Every request passes it once it is known whose it is, and again when it is answered; ``weight`` is a tenant's share."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._beginning = _Passes(weight)
        self._answered = _Passes(weight, SHARED_PASS)
        self._tenant: str | None = None
        self._mixed_at = -SHARED_S

    async def enter(self, tenant: str, size: int = 0) -> None:
        """Return when a request of ``size`` bytes may begin."""
        if tenant != self._tenant:
            self._mixed_at = self._mixed_at if self._tenant is None else asyncio.get_running_loop().time()
            self._tenant = tenant
        self._beginning.most = SHARED_PASS if self._shared else IN_A_PASS
        await self._beginning.turn(tenant, size)

    async def answered(self, tenant: str) -> None:
        """Return when a request may go on whose answer is there. A tenant that is alone need not wait for itself."""
        if self._shared:
            await self._answered.turn(tenant)

    @property
    def _shared(self) -> bool:
        return asyncio.get_running_loop().time() - self._mixed_at < SHARED_S


class _Passes:
    """Turns in the passes of the event loop, ``most`` in each."""

    def __init__(self, weight: Callable[[str], float], most: int = IN_A_PASS) -> None:
        self.most = most
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(weight)
        self._begun = 0
        """How many have had their turn in this pass."""

    async def turn(self, tenant: str, size: int = 0) -> None:
        loop = asyncio.get_running_loop()
        if not self._begun:
            loop.call_soon(self._pass)
        if self._begun < self.most:
            self._begun += 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.add(tenant, turn, size)
        await turn

    def _pass(self) -> None:
        """Another pass: who waits comes first, in turns by tenant."""
        taken = self._waiting.take(self.most, 1 << 62, lambda turn: not turn.done())
        for turn in taken:
            turn.set_result(None)
        self._begun = len(taken)
        if taken:
            asyncio.get_running_loop().call_soon(self._pass)
