"""A worker's registration: asking a dispatcher for an epoch, asking again whether it counts, and saying why there is none.

The dispatcher's answer is signed and says when. Deadlines were set, and jobs are listed, by the clocks of the machines where
gateways and dispatcher run, so from then on the worker goes by that time and not by its own clock (:class:`AnchoredClock`). Its own
clock still decides whether a message is too old or a key in force; there it may be ``MAX_SKEW_MS`` off.
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
"""A dispatcher that is just being restarted is not worth a line."""


class Registrar:
    """``describe`` makes the request of a worker that has the given epoch; ``epoch`` is 0 as long as it has none."""

    def __init__(self, bus: Bus, describe: Callable[[int], Registration]) -> None:
        self._bus = bus
        self._describe = describe
        self._clock = AnchoredClock(bus.clock)
        bus.clock = self._clock
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=_TELL_S)
        self.epoch = 0
        self.refused = ""
        """Why there is no registration, or why it does not count any more; empty when it does, as far as is known."""

    async def register(self) -> None:
        """Ask for an epoch until there is one."""
        began = self._bus.clock.monotonic()
        while True:
            try:
                self.epoch = await self._ask(0)
            except Unavailable as error:
                self._note("waiting for a dispatcher")
                if self._bus.clock.monotonic() - began > _QUIET_S:
                    self._tell(error)
                await asyncio.sleep(_AGAIN_S)
            except TetherError as error:
                self._note(error.message)
                self._tell(error)
                await asyncio.sleep(_REFUSED_S)
            else:
                log.info("registered with epoch %d", self.epoch, extra={"action": "registered"})
                return

    async def confirm(self, changed: Callable[[], None]) -> None:
        """Ask again and again whether the epoch still counts, until cancelled; ``changed`` hears of another one."""
        while True:
            await asyncio.sleep(_REFUSED_S if self.refused else _CONFIRM_S)
            try:
                epoch = await self._ask(self.epoch)
            except Unavailable:
                continue  # without a dispatcher, loaded models are served as before
            except TetherError as error:
                self._note(error.message)
                self._tell(error)
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

    def _tell(self, error: TetherError) -> None:
        """At once, and then every minute: who looks for a worker that does not join looks here first."""
        if self._told.passes(error.code) is not None:
            log.warning("not registered: %s", error, extra={"action": "register_failed", "code": error.code})
