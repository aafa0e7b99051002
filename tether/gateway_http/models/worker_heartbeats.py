"""Tracks workers' heartbeats in a gateway, so that "ready" means recently confirmed by a worker.

A route outlives its workers: it is kept while a dispatcher restarts, so that loaded models keep answering
without one. Heartbeats are stored unverified and verified on demand: every worker sends two a second.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tether.bus.bus import Bus, Message
from tether.crypto import MessageType
from tether.domain.manifest import Heartbeat, ModelRef
from tether.errors import BadEncoding
from tether.wire import codec


@dataclass
class _Beat:
    frame: bytes
    at: float
    """Arrival, in monotonic seconds."""
    ready: frozenset[ModelRef] | None = None
    """None until verified."""


class Heartbeats:
    """The last heartbeat of each worker. Use :meth:`listening`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._root = bus.names.bucket_key("liveness", "")
        self._beats: dict[str, _Beat] = {}

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receive heartbeats until the block ends."""
        subscription = await self._bus.subscribe(self._root + ">", self._received)
        try:
            yield
        finally:
            await subscription.unsubscribe()

    async def _received(self, message: Message) -> None:
        self._beats[message.subject[len(self._root) :]] = _Beat(message.data, self._bus.clock.monotonic())

    def holds(self, worker: str, ref: ModelRef) -> bool:
        """Return True if a worker confirmed a version within ``worker_timeout_s``."""
        beat = self._beats.get(worker)
        if beat is None or self._bus.clock.monotonic() - beat.at > self._bus.settings.worker_timeout_s:
            return False
        if beat.ready is None:
            beat.ready = self._verify(worker, beat.frame)
        return ref in beat.ready

    def _verify(self, worker: str, frame: bytes) -> frozenset[ModelRef]:
        """Return the versions in a heartbeat, if its worker signed it."""
        envelope = self._bus.verify_frame(frame, self._root + worker, MessageType.HEARTBEAT, max_age_ms=60_000)
        if envelope is None or envelope.sender != worker:
            return frozenset()
        try:
            return frozenset(codec.decode(envelope.body, Heartbeat).ready)
        except BadEncoding:
            return frozenset()
