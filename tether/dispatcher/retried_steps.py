"""Runs steps that are retried: a failed one is logged, and delays no other one."""

from __future__ import annotations

import logging
from collections.abc import Coroutine

from tether.bus.bus import Bus
from tether.errors import TetherError
from tether.process.log_rate_limiter import LogRateLimiter

log = logging.getLogger(__name__)


class Steps:
    """Logs each step's failure at most once in ten seconds."""

    def __init__(self, bus: Bus) -> None:
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=10.0)

    async def succeeded(self, what: str, step: Coroutine[None, None, None]) -> bool:
        """Await a step; return True if it succeeded."""
        try:
            await step
        except TetherError as error:
            if self._told.passes(f"{what} {error.code}") is not None:
                extra = {"action": "reconcile_failed", "code": error.code}
                log.warning("could not update %s: %s; retrying", what, error, extra=extra)
            return False
        return True
