"""Time of last use of each API key: noted in memory by each request, written periodically, read over all
gateways."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.errors import BadEncoding, TetherError
from tether.wire import codec
from tether.wire.subjects import token

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Interval in seconds at which new uses are written; the delay until other gateways see a key's first use."""

WRITE_S = 60.0
"""Minimum time in seconds between two writes of one gateway about the same key."""


class KeyUse(msgspec.Struct, frozen=True):
    """Last recorded use of a key through one gateway, at ``used_at`` (UTC seconds)."""

    key: str
    used_at: float


class KeyUsage:
    """The bucket ``keyuse``, with one entry per key and gateway. ``noted`` has this gateway's uses by key id."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = SignedBucket(bus, "keyuse", MessageType.KEY_USE)
        self._gateway = token(bus.signer.name)
        self._written: dict[str, tuple[float, float]] = {}
        """By key: the last use that was written, and the time of writing."""
        self.noted: dict[str, float] = {}

    async def keep(self, interval_s: float = LOOK_S) -> None:
        """Write new uses periodically, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await self.write()

    async def write(self, *, every_s: float = WRITE_S) -> int:
        """Write unwritten uses of keys not written for ``every_s`` seconds; return how many were due."""
        now, never = self._bus.clock.utc(), (0.0, 0.0)
        due = []
        for key, used in self.noted.items():
            last, at = self._written.get(key, never)
            if used > last and now >= at + every_s:
                due.append(KeyUse(key, used))
        for use in due:
            try:
                await self._bucket.put(f"{use.key}.{self._gateway}", codec.encode(use))
            except TetherError as error:
                log.info("key use not written, will be retried: %s", error, extra={"action": "key_use_failed"})
                break
            self._written[use.key] = (use.used_at, now)
        return len(due)

    async def last(self) -> dict[str, float]:
        """Return the last known use of each key over all gateways, in UTC seconds; this gateway's are
        current.

        Raises:
            BrokerUnavailable: no answer.
        """
        found = dict(self.noted)
        for entry, body in (await self._bucket.entries()).items():
            try:
                use = codec.decode(body, KeyUse)
            except BadEncoding:
                continue
            if entry.startswith(f"{use.key}."):
                found[use.key] = max(use.used_at, found.get(use.key, 0.0))
        return found
