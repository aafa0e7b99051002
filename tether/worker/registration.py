"""Registers a worker with a dispatcher, confirms the epoch, and reports why there is none.

The dispatcher's reply is signed and carries its time. Deadlines are set by the clocks of gateways and
dispatcher, so from then on the worker uses that time instead of its own clock (:class:`AnchoredClock`). Its
own clock still decides whether a message is too old or a key valid, with ``MAX_SKEW_MS`` of tolerance.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tether.bus import rpc
from tether.bus.bus import Bus
from tether.crypto import MessageType
from tether.domain.manifest import Epoch, Registration
from tether.errors import TetherError, Unavailable
from tether.process import lifecycle
from tether.process.clock import AnchoredClock
from tether.process.log_rate_limiter import LogRateLimiter
from tether.wire import codec

log = logging.getLogger(__name__)

_AGAIN_S = 0.2
_REFUSED_S = 2.0
_CONFIRM_S = 60.0
_TELL_S = 60.0
_QUIET_S = 5.0
"""Seconds without a dispatcher before a log line; a restart takes less."""


class Registrar:
    """Registers one worker. ``describe`` builds its request with the current epoch, 0 if it has none."""

    def __init__(self, bus: Bus, describe: Callable[[int], Registration]) -> None:
        self._bus = bus
        self._describe = describe
        self._clock = AnchoredClock(bus.clock)
        bus.clock = self._clock
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=_TELL_S)
        self.epoch = 0
        self.refused = ""
        """Why the worker is not registered; empty if it is."""

    async def register(self) -> None:
        """Ask dispatchers for an epoch until one answers."""
        began = self._bus.clock.monotonic()
        while True:
            try:
                self.epoch = await self._ask(0)
            except Unavailable as error:
                self._note("waiting for a dispatcher")
                if self._bus.clock.monotonic() - began > _QUIET_S:
                    self._log_failure(error)
                await asyncio.sleep(_AGAIN_S)
            except TetherError as error:
                self._note(error.message)
                self._log_failure(error)
                await asyncio.sleep(_REFUSED_S)
            else:
                log.info("registered with epoch %d", self.epoch, extra={"action": "registered"})
                return

    async def confirm(self, changed: Callable[[], None]) -> None:
        """Confirm the epoch periodically until cancelled; call ``changed`` when it is a new one."""
        while True:
            await asyncio.sleep(_REFUSED_S if self.refused else _CONFIRM_S)
            try:
                epoch = await self._ask(self.epoch)
            except Unavailable:
                continue  # without a dispatcher, loaded models are still served
            except TetherError as error:
                self._note(error.message)
                self._log_failure(error)
                continue
            if epoch != self.epoch:
                self.epoch = epoch
                changed()

    async def _ask(self, epoch: int) -> int:
        body = codec.encode(self._describe(epoch))
        answer = await rpc.ask(
            self._bus, "registerWorker", MessageType.REGISTER, body, answers=MessageType.REGISTERED, timeout=2.0
        )
        self._clock.anchor(answer.issued_at)
        self._note("")
        return codec.decode(answer.body, Epoch).epoch

    def _note(self, why: str) -> None:
        self.refused = why
        lifecycle.wait_for("registration", why)

    def _log_failure(self, error: TetherError) -> None:
        """Log the error at once, and then every minute."""
        if self._told.passes(error.code) is not None:
            log.warning("could not register: %s", error, extra={"action": "register_failed", "code": error.code})
