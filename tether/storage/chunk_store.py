"""Stores chunks of model files as objects of a JetStream object store (NATS ADR-20); ``nats object`` reads them too.

One chunk is one object: its name and its nuid are the hex SHA-256 of its bytes, its data is one message on
``$O.<bucket>.C.<nuid>``, its meta message follows once the data is stored. Both carry ``Nats-Rollup: sub``:
storing a
chunk twice leaves one, and storing it again repairs a damaged one. Compressed data says so in a header.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from tether.bus.bus import Bus, StoredMessage
from tether.bus.pending_requests import fail_on_disconnect
from tether.domain.chunking import ZSTD, Bytes, compressed, decompressed, digest_of
from tether.errors import BrokerUnavailable, CorruptChunk, DeadlineExceeded, TetherError
from tether.storage.object_meta import ChunkState, describe, state_of

WRITE_WINDOW = 24
READ_WINDOW = 16
LOOKUP = 256
"""Chunks per look-up."""
GROUP = 8
"""Chunks of an upload that are looked up together before they are sent."""
LOOKUPS_AHEAD = 2

_ROLLUP = {"Nats-Rollup": "sub"}
ENCODING = "Tether-Encoding"
"""Header of a data message whose content is compressed: :data:`tether.domain.chunking.ZSTD`."""

NO_MORE: Mapping[str, str] = MappingProxyType({})

T = TypeVar("T")


class ObjectChunkStore:
    """See :class:`tether.storage.upload.ChunkStore`.

    Requests are retried while the broker is away: at most ``patience_s`` per chunk, and ``deadline_s`` for a
    whole transfer. At most a window of chunks is in memory.
    """

    def __init__(self, bus: Bus, bucket: str, *, deadline_s: float = 3600.0, patience_s: float = 30.0) -> None:
        self._bus = bus
        self.bucket = bucket
        self._stream = bus.names.object_stream(bucket)
        self._deadline_s = deadline_s
        self._patience_s = patience_s

    async def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of ``digests`` that are not stored, in order, each once.

        Raises:
            BrokerUnavailable: no answer within ``patience_s``.
        """
        wanted = list(dict.fromkeys(digests))
        present: set[str] = set()
        for start in range(0, len(wanted), LOOKUP):
            present |= await self._present(wanted[start : start + LOOKUP])
        return [digest for digest in wanted if digest not in present]

    async def _lacking(self, digests: list[str], known: AbstractSet[str] | None) -> list[str]:
        """Return the chunks of an upload to store; takes the same time for stored and missing ones."""
        missing = set(await self.missing(digests))
        return [digest for digest in digests if digest in missing or (known is not None and digest not in known)]

    async def _present(self, digests: list[str]) -> set[str]:
        subjects = {self._meta_subject(digest): digest for digest in digests}
        found = await self._patiently(lambda: self._bus.direct_batch(self._stream, list(subjects)))
        return {subjects[subject] for subject, item in found.items() if state_of(item.data) is ChunkState.ALIVE}

    def name_of(self, digest: str) -> str:
        """Return a chunk's name in this store."""
        return digest

    async def put(self, chunks: AsyncIterator[tuple[str, Bytes]], known: AbstractSet[str] | None = None) -> int:
        """Store missing chunks; return their bytes. With ``known``, store all others even if they exist.

        Groups of chunks are looked up ahead of those being sent, because a request waits behind data already
        sent.

        Raises:
            QueueFull: the bucket is at its limit.
            DeadlineExceeded, BrokerUnavailable: a timeout, of the whole or of one chunk.
        """
        stored = 0
        seen: set[str] = set()
        asked: deque[tuple[asyncio.Task[list[str]], dict[str, Bytes]]] = deque()

        async def send() -> None:
            nonlocal stored
            question, group = asked[0]
            for digest in await question:
                stored += len(group[digest])
                await window.start(self._store(digest, group[digest]))
            asked.popleft()

        async with _deadline(self._deadline_s), BoundedTaskGroup(WRITE_WINDOW) as window:
            try:
                async for group in _groups(chunks):
                    fresh = {digest: chunk for digest, chunk in group if digest not in seen}
                    seen.update(fresh)
                    asked.append((asyncio.create_task(self._lacking(list(fresh), known), name="look-up"), fresh))
                    if len(asked) > LOOKUPS_AHEAD:
                        await send()
                while asked:
                    await send()
            finally:
                for question, _ in asked:
                    question.cancel()
                await asyncio.gather(*(question for question, _ in asked), return_exceptions=True)
        return stored

    async def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Return the chunks in order, decompressed; the caller verifies them. Several are read ahead.

        Close the iterator to stop early.

        Raises:
            CorruptChunk: a chunk is missing; ``field`` is its digest.
            DeadlineExceeded, BrokerUnavailable: a timeout, of the whole or of one chunk.
        """
        clock = self._bus.clock
        end = clock.monotonic() + self._deadline_s
        ahead: deque[asyncio.Task[bytes]] = deque()
        try:
            for digest in digests:
                ahead.append(asyncio.create_task(self._read(digest), name="read-chunk"))
                if len(ahead) == READ_WINDOW:
                    yield await ahead.popleft()
                if clock.monotonic() > end:
                    raise _too_late(self._deadline_s)
            while ahead:
                yield await ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def discard(self, digest: str) -> None:
        """Mark a chunk as deleted, so that the next upload stores it again."""
        await self._publish_meta(digest, 0, deleted=True)

    async def _store(self, digest: str, chunk: Bytes) -> None:
        stored = await asyncio.to_thread(compressed, chunk)
        if stored is None:
            await self._send(digest, chunk, digest)
        else:
            await self._send(digest, stored, await asyncio.to_thread(digest_of, stored), {ENCODING: ZSTD})

    async def _send(self, name: str, stored: Bytes, digest: str, headers: Mapping[str, str] = NO_MORE) -> None:
        """Store a chunk in its current form; ``digest`` is that form's SHA-256."""
        await self._publish(self._bus.names.object_chunk(self.bucket, name), stored, headers)
        await self._publish_meta(name, len(stored), stored=digest)

    async def _publish_meta(self, digest: str, size: int, *, deleted: bool = False, stored: str = "") -> None:
        state = ChunkState.DAMAGED if deleted else ChunkState.ALIVE
        meta = describe(self.bucket, digest, size, state, self._bus.clock.utc(), digest=stored)
        await self._publish(self._meta_subject(digest), meta)

    async def _publish(self, subject: str, payload: Bytes, more: Mapping[str, str] = NO_MORE) -> None:
        limit, headers = self._patience_s, {**_ROLLUP, **more}
        await self._patiently(lambda: self._bus.publish_acked(subject, payload, headers=dict(headers), timeout=limit))

    async def _read(self, digest: str) -> bytes:
        subject = self._bus.names.object_chunk(self.bucket, digest)
        limit = self._patience_s
        found = await self._patiently(lambda: self._bus.direct_get(self._stream, subject, timeout=limit))
        if found is None:
            raise CorruptChunk(f"chunk {digest} is not in the store; push the model again", field=digest)
        return await plain_form(digest, found)

    def _meta_subject(self, digest: str) -> str:
        return self._bus.names.object_meta(self.bucket, encoded_name(digest))

    async def _patiently(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Retry while the broker is away; the action must be safe to repeat."""
        clock = self._bus.clock
        end = clock.monotonic() + self._patience_s
        while True:
            try:
                with fail_on_disconnect():
                    return await attempt()
            except BrokerUnavailable:
                if clock.monotonic() >= end:
                    raise
            await asyncio.sleep(0.1)


async def plain_form(name: str, found: StoredMessage) -> bytes:
    """Return the content of a chunk's data message, decompressed if needed.

    Raises:
        CorruptChunk: it cannot be decompressed; ``field`` is the chunk's name.
    """
    encoding = found.headers.get(ENCODING, "")
    if not encoding:
        return found.data
    try:
        if encoding == ZSTD:
            return await asyncio.to_thread(decompressed, found.data)
    except CorruptChunk as error:
        raise CorruptChunk(f"chunk {name} is altered in the store; push the model again", field=name) from error
    raise CorruptChunk(
        f"chunk {name} has the encoding '{encoding[:16]}', which this release does not support", field=name
    )


def encoded_name(digest: str) -> str:
    """Return a chunk's name as the last token of its meta subject."""
    return base64.urlsafe_b64encode(digest.encode()).decode()


async def _groups(chunks: AsyncIterator[tuple[str, Bytes]]) -> AsyncIterator[list[tuple[str, Bytes]]]:
    group: list[tuple[str, Bytes]] = []
    async for chunk in chunks:
        group.append(chunk)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """``asyncio.timeout`` that raises an error of the tree."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise _too_late(seconds) from error
        raise


def _too_late(seconds: float) -> TetherError:
    return DeadlineExceeded(
        f"transferring the model's chunks took longer than {seconds:g} s; stored chunks are kept: try again"
    )


class BoundedTaskGroup:
    """Runs at most ``size`` coroutines at a time; all have ended when the block ends. The first error cancels
    the rest.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._running: set[asyncio.Task[None]] = set()

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start ``work`` as soon as a slot is free."""
        try:
            while len(self._running) >= self._size:
                await self._settle(asyncio.FIRST_COMPLETED)
        except BaseException:
            work.close()
            raise
        self._running.add(asyncio.create_task(work, name="window"))

    async def _settle(self, when: str) -> None:
        done, self._running = await asyncio.wait(self._running, return_when=when)
        errors = [error for task in done if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._running:
                await self._settle(asyncio.FIRST_COMPLETED)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
