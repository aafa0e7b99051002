"""Requests begin in turns by tenant, a few in each pass of the event loop, so that a flood waits behind itself.

What a request costs before it is in its lane's queue, which is fair already, is time of the event loop: reading, checking, signing.
A thousand requests that come together would all have theirs before the next one is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tether.gateway_http.fair_queue import FairQueue

IN_A_PASS = 8
"""Requests that begin in one pass of the event loop: about two milliseconds of work."""


class RequestTurns:
    """Every request passes it once it is known whose it is; ``weight`` is a tenant's share."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(weight)
        self._begun = 0
        """Requests that have begun in this pass."""

    async def enter(self, tenant: str, size: int = 0) -> None:
        """Return when a request of ``size`` bytes may begin."""
        loop = asyncio.get_running_loop()
        if not self._begun:
            loop.call_soon(self._pass)
        if self._begun < IN_A_PASS:
            self._begun += 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.add(tenant, turn, size)
        await turn

    def _pass(self) -> None:
        """Another pass: who waits comes first, in turns by tenant."""
        taken = self._waiting.take(IN_A_PASS, 1 << 62, lambda turn: not turn.done())
        for turn in taken:
            turn.set_result(None)
        self._begun = len(taken)
        if taken:
            asyncio.get_running_loop().call_soon(self._pass)
