"""How full a stream is."""

from __future__ import annotations

import math
from datetime import datetime

import msgspec

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.streams.layout import STREAM_NOT_FOUND


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
