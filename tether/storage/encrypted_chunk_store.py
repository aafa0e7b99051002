"""Stores chunks of an encrypted model: requested by plain digests, stored encrypted under other names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing

from tether.bus.bus import Bus
from tether.crypto.model_encryption import ChunkSeal
from tether.domain.chunking import Bytes, digest_of
from tether.errors import CorruptChunk, DecryptionFailed
from tether.storage.chunk_store import ObjectChunkStore


class SealedChunkStore:
    """See :class:`tether.storage.upload.ChunkStore`; digests are those of plain chunks, errors name the stored ones."""

    def __init__(self, bus: Bus, bucket: str, seal: ChunkSeal) -> None:
        self.bucket = bucket
        self._store = _Closing(bus, bucket, seal)
        self._seal = seal

    async def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of ``digests`` that are not stored under this key, in order, each once.

        Raises:
            BrokerUnavailable
        """
        digest_of = {self._seal.name(digest): digest for digest in digests}
        return [digest_of[name] for name in await self._store.missing(list(digest_of))]

    def name_of(self, digest: str) -> str:
        """Return a chunk's name in the store."""
        return self._seal.name(digest)

    async def put(self, chunks: AsyncIterator[tuple[str, Bytes]], known: AbstractSet[str] | None = None) -> int:
        """Encrypt and store missing chunks; return their plain bytes. ``known``: as for
        :meth:`ObjectChunkStore.put`.

        Raises:
            QueueFull, DeadlineExceeded, BrokerUnavailable: as :meth:`ObjectChunkStore.put`.
        """

        async def named() -> AsyncIterator[tuple[str, Bytes]]:
            async for digest, chunk in chunks:
                yield self._seal.name(digest), chunk

        names = None if known is None else {self._seal.name(digest) for digest in known}
        return await self._store.put(named(), names)

    async def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Return the plain chunks in order. Close the iterator to stop early.

        Raises:
            CorruptChunk: one is missing or altered; ``field`` is its name in the store.
            DeadlineExceeded, BrokerUnavailable: it took too long, as a whole or for one chunk.
        """
        names = [self._seal.name(digest) for digest in digests]
        async with aclosing(self._store.get(names)) as chunks:
            for name in names:
                stored = await anext(chunks)
                try:
                    chunk = await asyncio.to_thread(self._seal.decrypt, name, stored)
                except DecryptionFailed as error:
                    raise CorruptChunk(
                        f"chunk {name} is altered in the store; push the model again", field=name
                    ) from error
                yield chunk


class _Closing(ObjectChunkStore):
    """Receives plain chunks by their stored names, and encrypts missing ones while sending."""

    def __init__(self, bus: Bus, bucket: str, seal: ChunkSeal) -> None:
        super().__init__(bus, bucket)
        self._seal = seal

    async def _store(self, digest: str, chunk: Bytes) -> None:
        def close() -> tuple[bytes, str]:
            closed = self._seal.encrypt(digest, chunk)
            return closed, digest_of(closed)

        await self._send(digest, *await asyncio.to_thread(close))
