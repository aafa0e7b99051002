"""How full a stream is, and how much of it one tenant may have."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from datetime import datetime

import msgspec

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.errors import BrokerUnavailable, PermissionDenied
from tether.streams.layout import STREAM_NOT_FOUND

log = logging.getLogger(__name__)

FACTOR = 4.0
"""How many times what is free in a stream a tenant with the weight 1 may have there (dynamic thresholds: Choudhury and Hahne, 1998)."""

_LOOK_S = 1.0
_AGAIN_S = 0.1
_AT_ONCE_S = 0.01
_ANSWER_S = 1.0
_FILLS = 0.75
_PART = 8
_NEVER: tuple[float, StreamUse | None] = (float("-inf"), None)


class StreamUse(msgspec.Struct, frozen=True):
    """What a stream holds. ``most``: the bytes it may hold (-1: any number); ``since``: when its first message was stored, UTC
    seconds (infinite without one)."""

    bytes: int
    most: int
    messages: int
    since: float

    @property
    def share(self) -> float:
        """0 to 1; 0 without a bound."""
        return self.bytes / self.most if self.most > 0 else 0.0


async def stream_use(bus: Bus, stream: str, *, timeout: float = 5.0) -> StreamUse | None:
    """How full a stream is; None when there is no such stream.

    Raises:
        JetStreamError, BrokerUnavailable
    """
    try:
        info = await bus.api(f"STREAM.INFO.{stream}", timeout=timeout)
    except JetStreamError as error:
        if error.err_code == STREAM_NOT_FOUND:
            return None
        raise
    state = info["state"]
    since = datetime.fromisoformat(state["first_ts"]).timestamp() if state["messages"] else math.inf
    return StreamUse(state["bytes"], info["config"]["max_bytes"], state["messages"], since)


def tenant_limit(use: StreamUse, weight: float) -> int | None:
    """Bytes that a tenant may have in a stream: :data:`FACTOR` times its weight times what is free. None when even all that is in
    it are fewer."""
    if use.most <= 0:
        return None
    limit = int(FACTOR * weight * max(0, use.most - use.bytes))
    return limit if limit < use.bytes else None


class StreamUses:
    """How full streams are, as one service knows: at most one look a second at each, ten where it fills up, and one whenever the
    service itself has stored an eighth of what was free, so that up to eight of them are held back in time."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._uses: dict[str, tuple[float, StreamUse | None]] = {}
        self._taken: Counter[str] = Counter()
        """Bytes that this service has stored since its last look."""
        self._turns: dict[str, asyncio.Lock] = {}
        self._may_look = True

    async def of(self, stream: str) -> StreamUse | None:
        """How full a stream is by what was seen within the last second and what this service stored since; None when that is not
        known."""
        async with self._turns.setdefault(stream, asyncio.Lock()):  # who asked first goes on first
            if self._may_look and not self._is_fresh(stream):
                use = await self._look(stream, self._uses.get(stream, _NEVER)[1])
                self._uses[stream] = self._bus.clock.monotonic(), use
                self._taken[stream] = 0
        use = self._uses.get(stream, _NEVER)[1]
        return None if use is None else msgspec.structs.replace(use, bytes=use.bytes + self._taken[stream])

    def took(self, stream: str, size: int) -> None:
        """This service has stored ``size`` bytes, or is about to."""
        self._taken[stream] += size

    def _is_fresh(self, stream: str) -> bool:
        """A store that fills up is looked at again sooner."""
        at, use = self._uses.get(stream, _NEVER)
        age = self._bus.clock.monotonic() - at
        if use is None or use.most <= 0:
            return age < _LOOK_S
        if self._taken[stream] * _PART > use.most - use.bytes:
            return age < _AT_ONCE_S
        return age < (_AGAIN_S if use.share >= _FILLS else _LOOK_S)

    async def _look(self, stream: str, before: StreamUse | None) -> StreamUse | None:
        """A store that does not answer is as full as it was: what needs it will wait for it."""
        try:
            return await stream_use(self._bus, stream, timeout=_ANSWER_S)
        except PermissionDenied as error:
            self._may_look = False
            self._uses.clear()
            log.warning("full stores are seen only when they refuse: %s; write the broker's configuration again", error)
            return None
        except (BrokerUnavailable, JetStreamError):
            return before
