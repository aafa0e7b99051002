"""Steps that are tried again and again: one that fails is logged, and holds up no other one."""

from __future__ import annotations

import logging
from collections.abc import Coroutine

from tether.bus.bus import Bus
from tether.errors import TetherError
from tether.process.log_rate_limiter import LogRateLimiter

log = logging.getLogger(__name__)


class Steps:
    """Says of each step what went wrong, once in ten seconds."""

    def __init__(self, bus: Bus) -> None:
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=10.0)

    async def done(self, what: str, step: Coroutine[None, None, None]) -> bool:
        """Whether a step was done."""
        try:
            await step
        except TetherError as error:
            if self._told.passes(f"{what} {error.code}") is not None:
                extra = {"action": "reconcile_failed", "code": error.code}
                log.warning("%s: %s; will try again", what, error, extra=extra)
            return False
        return True
