"""Measures how full a stream is, and limits each tenant's share of it."""

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
"""Free-space multiple of a tenant of weight 1 (dynamic thresholds: Choudhury and Hahne, 1998)."""

_LOOK_S = 1.0
_AGAIN_S = 0.1
_AT_ONCE_S = 0.01
_ANSWER_S = 1.0
_FILLS = 0.75
_PART = 8
_NEVER: tuple[float, StreamUse | None] = (float("-inf"), None)


class StreamUse(msgspec.Struct, frozen=True):
    """Usage of a stream.

    ``most``: its limit in bytes (-1: none); ``since``: when its first message was stored, UTC seconds
    (infinite without one).
    """

    bytes: int
    most: int
    messages: int
    since: float

    @property
    def share(self) -> float:
        """Return the used fraction, 0 to 1; 0 without a limit."""
        return self.bytes / self.most if self.most > 0 else 0.0


async def stream_use(bus: Bus, stream: str, *, timeout: float = 5.0) -> StreamUse | None:
    """Return the usage of a stream; None if it does not exist.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
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
    """Return a tenant's limit in a stream in bytes: :data:`FACTOR` times weight times free space.

    None if even the whole content is less.
    """
    if use.most <= 0:
        return None
    limit = int(FACTOR * weight * max(0, use.most - use.bytes))
    return limit if limit < use.bytes else None


class StreamUses:
    """Cached usage of streams in one service.

    Each stream is read at most once a second, ten times a second if it fills up, and whenever the service has
    stored an eighth of the free space: so up to eight services notice in time.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._uses: dict[str, tuple[float, StreamUse | None]] = {}
        self._taken: Counter[str] = Counter()
        """Bytes that this service has stored since its last read."""
        self._turns: dict[str, asyncio.Lock] = {}
        self._may_look = True

    async def of(self, stream: str) -> StreamUse | None:
        """Return the usage of a stream, at most a second old, plus own writes since; None if unknown."""
        async with self._turns.setdefault(stream, asyncio.Lock()):  # the first to ask goes on first
            if self._may_look and not self._is_fresh(stream):
                use = await self._read(stream, self._uses.get(stream, _NEVER)[1])
                self._uses[stream] = self._bus.clock.monotonic(), use
                self._taken[stream] = 0
        use = self._uses.get(stream, _NEVER)[1]
        return None if use is None else msgspec.structs.replace(use, bytes=use.bytes + self._taken[stream])

    def took(self, stream: str, size: int) -> None:
        """Count ``size`` bytes that this service has stored, or is about to store."""
        self._taken[stream] += size

    def _is_fresh(self, stream: str) -> bool:
        """Return True if the cached usage is recent enough; a stream that fills up is read more often."""
        at, use = self._uses.get(stream, _NEVER)
        age = self._bus.clock.monotonic() - at
        if use is None or use.most <= 0:
            return age < _LOOK_S
        if self._taken[stream] * _PART > use.most - use.bytes:
            return age < _AT_ONCE_S
        return age < (_AGAIN_S if use.share >= _FILLS else _LOOK_S)

    async def _read(self, stream: str, before: StreamUse | None) -> StreamUse | None:
        """Read the usage; a store that does not answer counts as full as before."""
        try:
            return await stream_use(self._bus, stream, timeout=_ANSWER_S)
        except PermissionDenied as error:
            self._may_look = False
            self._uses.clear()
            log.warning(
                "full stores are noticed only when they refuse: %s; write the broker's configuration again", error
            )
            return None
        except (BrokerUnavailable, JetStreamError):
            return before
