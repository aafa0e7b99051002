"""When each API key was last used: noted in memory by each request, written now and then, read over all gateways."""

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
"""How often the notes are looked through; the first use of a key is known to others after this long."""

WRITE_S = 60.0
"""A gateway writes about a key at most this often."""


class KeyUse(msgspec.Struct, frozen=True):
    """A key was used through one gateway at ``used_at`` (UTC seconds) and not later, as far as was written."""

    key: str
    used_at: float


class KeyUsage:
    """The bucket ``keyuse``: an entry for each key and gateway. ``noted`` is this gateway's, by key id."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = SignedBucket(bus, "keyuse", MessageType.KEY_USE)
        self._gateway = token(bus.signer.name)
        self._written: dict[str, tuple[float, float]] = {}
        """By key: the use that was written last, and when it was."""
        self.noted: dict[str, float] = {}

    async def keep(self, look_s: float = LOOK_S) -> None:
        """Write what is new, for as long as the gateway runs."""
        while True:
            await asyncio.sleep(look_s)
            await self.write()

    async def write(self, *, every_s: float = WRITE_S) -> int:
        """Write the uses that were not written and whose key was not written about for ``every_s``; how many."""
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
                log.info("key use was not written: %s", error, extra={"action": "key_use_failed"})
                break
            self._written[use.key] = (use.used_at, now)
        return len(due)

    async def last(self) -> dict[str, float]:
        """The last known use of each key over all gateways, UTC seconds; this gateway's own up to now.

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
