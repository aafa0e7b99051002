"""Restores chunks that the store has lost from the cache of a worker that hosts a version with them.

Only workers whose route lists such a version are asked, each on its own subject, so that others do not learn
of the chunk. A chunk travels in the form in which the worker stores it; one of an encrypted model stays
encrypted.
The
requester verifies it. A worker also answers on its own subject, because it may not publish to inboxes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

from tether.bus.bus import Bus, Message
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.manifest import Route
from tether.domain.partition import ChunkRequest
from tether.errors import BadEncoding, TetherError
from tether.wire import codec

log = logging.getLogger(__name__)

WAIT_S = 10.0
"""Timeout of a worker's answer, in seconds."""

_MAX_AGE_MS = 30_000

Proof = Callable[[bytes], bool]
"""Returns whether a chunk's content, encrypted if the store encrypts it, matches its name. Blocks."""


class ChunkLenders:
    """Requests chunks from workers, for a model store."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._routes = KvBucket(bus, "routes")
        self._asked: dict[tuple[str, str], asyncio.Future[bytes]] = {}

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receive answers until the block ends."""
        subscription = await self._bus.subscribe(self._bus.names.chunk("*"), self._heard)
        try:
            yield
        finally:
            await subscription.unsubscribe()

    async def _heard(self, message: Message) -> None:
        # an answer to no request does not need its signature verified
        if not self._asked:
            return
        envelope = self._bus.verify_message(message, MessageType.CHUNK, once=True, max_age_ms=_MAX_AGE_MS)
        if envelope is None or message.subject != self._bus.names.chunk(envelope.sender):
            return
        waiting = self._asked.get((envelope.sender, envelope.header.message_id))
        if waiting is not None and not waiting.done():
            waiting.set_result(envelope.body)

    async def borrow(self, name: str, versions: Iterable[str], right: Proof) -> tuple[bytes, str] | None:
        """Return a chunk that is ``right``, and the worker that had it; None if no worker that hosts one of
        ``versions`` (``model:version``) has it.

        Raises:
            BrokerUnavailable: no answer from the broker.
        """
        for worker in await self._holders(versions):
            chunk = await self._ask(worker, name)
            if not chunk:
                continue
            if await asyncio.to_thread(right, chunk):
                return chunk, worker
            log.error("%s sent other content than chunk %s", worker, name, extra={"action": "chunk_refused"})
        return None

    async def _holders(self, versions: Iterable[str]) -> list[str]:
        found: dict[str, None] = {}
        for version in versions:
            model, _, number = version.rpartition(":")
            subject = self._routes.subject(self._bus.names.version_key(model, int(number)))
            for subjects in (subject, f"{subject}.*"):
                async for item in self._bus.direct_scan(self._routes.stream, subjects):
                    envelope = self._bus.verify_frame(item.data, item.subject, MessageType.ROUTE)
                    with suppress(BadEncoding):
                        route = None if envelope is None else codec.decode(envelope.body, Route)
                        found.update(dict.fromkeys(route.workers if route is not None else ()))
        return list(found)

    async def _ask(self, worker: str, name: str) -> bytes:
        subject = self._bus.names.wanted(worker)
        frame = self._bus.signer.sign_envelope(MessageType.WANTED, subject, codec.encode(ChunkRequest(name)))
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[worker, name] = waiting
        try:
            await self._bus.publish(subject, frame)
            async with asyncio.timeout(WAIT_S):
                return await waiting
        except TimeoutError:
            return b""
        finally:
            del self._asked[worker, name]


@asynccontextmanager
async def lending(bus: Bus, read: Callable[[str], bytes | None]) -> AsyncIterator[None]:
    """Answer chunk requests of model stores until the block ends. ``read`` returns a verified chunk or None;
    it blocks and runs in a thread.
    """

    async def wanted(message: Message) -> None:
        envelope = bus.verify_message(message, MessageType.WANTED, once=True, max_age_ms=_MAX_AGE_MS)
        if envelope is None:
            return
        try:
            digest = codec.decode(envelope.body, ChunkRequest).digest
            chunk = await asyncio.to_thread(read, digest) or b""
            subject = bus.names.chunk(bus.signer.name)
            await bus.publish(subject, bus.signer.sign_envelope(MessageType.CHUNK, subject, chunk, message_id=digest))
        except TetherError as error:
            log.warning("chunk not sent: %s", error, extra={"action": "chunk_not_lent", "code": error.code})

    subscription = await bus.subscribe(bus.names.wanted(bus.signer.name), wanted)
    try:
        yield
    finally:
        await subscription.unsubscribe()
