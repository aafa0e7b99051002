"""Watches for recreated infer streams of a cluster, so that their lost bundles are sent again."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.domain.worker_protocol import StreamsMade
from tether.errors import BadEncoding
from tether.wire import codec

log = logging.getLogger(__name__)


@asynccontextmanager
async def following(bus: Bus, renewed: Callable[[set[str]], None]) -> AsyncIterator[None]:
    """Call ``renewed`` with the names of recreated streams, until the block ends."""
    known: dict[str, str] = {}

    def on_entry(_: str, body: bytes | None) -> None:
        try:
            made = dict(codec.decode(body, StreamsMade).made) if body is not None else {}
        except BadEncoding as error:
            log.warning("ignored an unreadable stream record: %s", error, extra={"action": "entry_refused"})
            return
        others = {stream for stream, created in made.items() if known.get(stream, created) != created}
        known.update(made)
        if others:
            log.warning(
                "infer streams were recreated, sending their bundles again: %s",
                ", ".join(sorted(others)),
                extra={"action": "streams_renewed"},
            )
            renewed(others)

    async with SignedBucket(bus, "routes", MessageType.ROUTE).watch(on_entry, key=StreamsMade.KEY):
        yield
