"""Recreates infer streams of a cluster on another server when theirs is down.

The streams of the shared infer lanes are in memory with one replica, on one server of a cluster: with a
replica on each, a request took two to ten times as long (ADR 33). When that server is down, the stream does
not answer. Then it is deleted and created on another server, followed by its lanes. Its messages are lost, so
gateways resend unanswered ones, and workers restart their pulls. Both learn the stream's creation time:
gateways from the bucket ``routes``, workers from their assignment. So it does not matter which dispatcher
recreated it, or which service was down then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.bus.key_value.bucket import SignedBucket
from tether.domain.worker_protocol import StreamsMade
from tether.errors import BadEncoding, BrokerUnavailable, TetherError
from tether.process import metrics
from tether.process.log_rate_limiter import LogRateLimiter
from tether.streams.layout import STREAM_NOT_FOUND, streams
from tether.wire import codec

log = logging.getLogger(__name__)

SILENT_S = 3.0
"""Seconds without an answer before a stream is recreated, which loses its messages."""
_LOOK_S = 1.0
_ASK_S = 1.0
_DELETE_S = 0.5


class InferStreams:
    """Watches the streams of the shared infer lanes for one dispatcher.

    ``on_made`` is called with a recreated stream, which has no consumers; ``on_change`` when :attr:`made`
    changed.
    """

    def __init__(
        self, bus: Bus, routes: SignedBucket, *, on_made: Callable[[str], None], on_change: Callable[[], None]
    ) -> None:
        self._bus = bus
        self._routes = routes
        self._on_made = on_made
        self._on_change = on_change
        self._streams = [bus.names.infer_stream(shard) for shard in range(bus.names.infer_shards)]
        self._silent_since: dict[str, float] = {}
        self._created: dict[str, str] = {}
        self._stored: StreamsMade | None = None
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=10.0)

    @property
    def made(self) -> str:
        """Return a text that changes when a stream is recreated; empty while unknown, and without a cluster."""
        if self._bus.settings.replicas == 1 or not self._created:
            return ""
        return ",".join(self._created.get(stream, "") for stream in self._streams)

    async def keep(self) -> None:
        """Watch the streams until cancelled; a single broker's streams need no watch."""
        while self._bus.settings.replicas > 1:
            await asyncio.gather(*map(self._check, self._streams))
            try:
                await self._publish_created()
            except TetherError as error:
                self._complain("could not publish the creation times of infer streams", error)
            await asyncio.sleep(_LOOK_S)

    async def _check(self, stream: str) -> None:
        try:
            info = await self._bus.api(f"STREAM.INFO.{stream}", timeout=_ASK_S)
        except BrokerUnavailable:
            await self._on_no_answer(stream)
        except JetStreamError as error:
            if error.err_code == STREAM_NOT_FOUND:
                await self._make(stream)
        except TetherError as error:
            self._complain(f"could not check {stream}", error)
        else:
            self._silent_since.pop(stream, None)
            self._note(stream, info["created"])

    def _note(self, stream: str, created: str) -> None:
        if self._created.get(stream) != created:
            self._created[stream] = created
            self._on_change()

    async def _on_no_answer(self, stream: str) -> None:
        """Handle a missing answer: recreate the stream if that lasts and the rest of the cluster answers."""
        now = self._bus.clock.monotonic()
        since = self._silent_since.setdefault(stream, now)
        if now - since >= SILENT_S and await self._others_answer():
            await self._make(stream)

    async def _others_answer(self) -> bool:
        """Return True if a stream with a replica on every server has a leader: then the cluster itself is up."""
        try:
            answer = await self._bus.api(f"STREAM.INFO.{self._routes.raw.stream}", timeout=_ASK_S)
        except TetherError:
            return False
        return bool((answer.get("cluster") or {}).get("leader"))

    async def _make(self, stream: str) -> None:
        log.warning(
            "the server of %s is down; recreating the stream on another one",
            stream,
            extra={"action": "stream_renewed", "stream": stream},
        )
        (config,) = [one for one in streams(self._bus.names, self._bus.settings) if one["name"] == stream]
        try:
            await _renew(self._bus, config)
        except TetherError as error:
            self._complain(f"could not recreate {stream}", error)
            return
        metrics.STREAMS_RENEWED.inc()
        self._silent_since.pop(stream, None)
        self._on_made(stream)
        await self._check(stream)

    def adopt(self, body: bytes) -> None:
        """Adopt the creation times that a dispatcher stored, so that they are not published twice."""
        try:
            self._stored = codec.decode(body, StreamsMade)
        except BadEncoding as error:
            self._complain("rewriting an invalid entry about infer streams", error)
        else:
            self._created = dict(self._stored.made)

    async def _publish_created(self) -> None:
        """Store the streams' creation times if they differ from the stored ones."""
        wanted = StreamsMade(made=tuple(sorted(self._created.items())))
        if self._created and wanted != self._stored:
            await self._routes.put(StreamsMade.KEY, codec.encode(wanted))
            self._stored = wanted

    def _complain(self, what: str, error: TetherError) -> None:
        if self._told.passes(f"{what} {error.code}") is not None:
            log.warning("%s: %s; retrying", what, error, extra={"action": "streams_failed", "code": error.code})


async def _renew(bus: Bus, config: dict[str, Any]) -> None:
    """Delete a stream that does not answer, and create it on a server that does.

    Raises:
        JetStreamError, PermissionDenied, BrokerUnavailable: retry; the stream may exist or not.
    """
    name = config["name"]
    try:
        await bus.api(f"STREAM.DELETE.{name}", timeout=_DELETE_S)
    except BrokerUnavailable:
        # the server that would answer is the one that is down; the cluster has recorded the deletion
        log.debug("deletion of %s not acknowledged", name, extra={"action": "stream_deleted"})
    except JetStreamError as error:
        if error.err_code != STREAM_NOT_FOUND:
            raise
    await bus.api(f"STREAM.CREATE.{name}", config, timeout=2.0)
