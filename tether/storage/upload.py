"""Moves a model file from an HTTP body into the chunk store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from tether.bus.bus import Bus
from tether.domain.chunking import Bytes, Cutter, cut
from tether.domain.manifest import ModelFile
from tether.errors import InvalidRequest

log = logging.getLogger(__name__)

Chunks = AsyncIterator[tuple[str, Bytes]]

MODEL_PATH = "model.onnx"
"""Path of the one file of an ONNX version."""

LARGEST_ONNX = (2 << 30) - 1
"""Maximum size of a protobuf message, so of a self-contained ONNX model."""


class ChunkStore(Protocol):
    """Content-addressed chunks of model files; a digest is the hex SHA-256 of its chunk."""

    async def missing(self, digests: Sequence[str]) -> list[str]: ...

    async def put(self, chunks: AsyncIterator[tuple[str, Bytes]], known: AbstractSet[str] | None = None) -> int:
        """Store chunks, several in flight; return the bytes that were missing, or are not ``known``."""

    def get(self, digests: Sequence[str]) -> AsyncIterator[bytes]:
        """Return the chunks in order, as stored; the caller verifies them.

        Raises:
            CorruptChunk: a chunk is missing.
        """


async def upload(
    bus: Bus,
    store: ChunkStore,
    body: AsyncIterator[bytes],
    *,
    limit: int,
    path: str = MODEL_PATH,
    counted: Callable[[Chunks], Chunks] = lambda chunks: chunks,
    whole: bool = False,
    known: AbstractSet[str] | None = None,
) -> tuple[ModelFile, int]:
    """Split ``body`` into chunks and store new ones; return the file's description and the bytes that were new.

    Only a window of chunks is in memory; ``counted`` receives each before it is stored. ``known``: as for
    :meth:`ChunkStore.put`. Stored chunks have no effect until a manifest references them.
    Without ``whole`` the description has no digest of the file: the model store reads the whole file anyway.

    Raises:
        PayloadTooLarge: ``body`` has more than ``limit`` bytes, or than ONNX allows; reading stopped there.
        InvalidRequest: ``body`` is empty.
        QueueFull, DeadlineExceeded, BrokerUnavailable: from the store.
    """
    began = bus.clock.monotonic()
    cutter = Cutter(whole=whole)
    stored = await store.put(counted(cut(body, min(limit, LARGEST_ONNX), cutter)), known)
    if not cutter.sizes:
        raise InvalidRequest("the body is empty; send the bytes of the model file", field="body")
    size, seconds = sum(cutter.sizes), bus.clock.monotonic() - began
    log.info("stored %d new bytes of %d in %.2f s", stored, size, seconds, extra={"action": "model_uploaded"})
    return ModelFile(path, size, cutter.digest, tuple(cutter.digests), tuple(cutter.sizes)), stored
