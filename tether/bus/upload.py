"""A model file on its way from an HTTP body into the chunk store."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tether.bus.chunks import PIECE, digest_of
from tether.bus.connection import Bus
from tether.errors import InvalidRequest, PayloadTooLarge
from tether.model import ModelFile
from tether.ports import ChunkStore

if TYPE_CHECKING:
    from hashlib import _Hash

log = logging.getLogger(__name__)

MODEL_PATH = "model.onnx"
"""What the one file of an ONNX version is called."""

LARGEST_ONNX = (2 << 30) - 1
"""Protobuf ends here, so no larger file can be one self-contained ONNX model."""


async def upload(
    bus: Bus, store: ChunkStore, body: AsyncIterator[bytes], *, limit: int, path: str = MODEL_PATH
) -> tuple[ModelFile, int]:
    """Cut ``body`` into pieces and store those that are new; the file's description and the bytes that were new.

    Only a window of pieces is in memory. Until a manifest names them, stored pieces mean nothing to anybody.

    Raises:
        PayloadTooLarge: ``body`` has more than ``limit`` bytes, or than ONNX allows; nothing more of it was read.
        InvalidRequest: ``body`` is empty.
        QueueFull, DeadlineExceeded, BrokerUnavailable: from the store.
    """
    began = bus.clock.monotonic()
    whole = hashlib.sha256()
    digests: list[str] = []
    size = 0

    async def pieces() -> AsyncIterator[tuple[str, bytes]]:
        nonlocal size
        async for piece in cut(body, min(limit, LARGEST_ONNX)):
            digest = await asyncio.to_thread(_hash_both, whole, piece)
            digests.append(digest)
            size += len(piece)
            yield digest, piece

    stored = await store.put(pieces())
    if not size:
        raise InvalidRequest("the body is empty; send the bytes of the model file", field="body")
    seconds = bus.clock.monotonic() - began
    log.info("stored %d new bytes of %d in %.2f s", stored, size, seconds, extra={"action": "model_uploaded"})
    return ModelFile(path, size, whole.hexdigest(), tuple(digests)), stored


async def cut(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """Pieces of ``PIECE`` bytes, the last one shorter.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes came.
    """
    pending = bytearray()
    total = 0
    async for part in body:
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(
                f"the model file has more than {limit} bytes, the most this platform takes", field="body"
            )
        rest = memoryview(part)
        while rest:
            room = PIECE - len(pending)
            pending += rest[:room]
            rest = rest[room:]
            if len(pending) == PIECE:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


def _hash_both(whole: _Hash, piece: bytes) -> str:
    whole.update(piece)
    return digest_of(piece)
