"""Content-defined cutting: where a file is cut depends on the bytes around the cut, not on how far in they are.

So bytes that are put in or taken out change the chunks they fall into, and no others. The algorithm is FastCDC (Xia et
al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems", IEEE TPDS 2020), as the
library pyfastcdc has it, with its published gear table and normalisation level 1. Client and gateway cut alike.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import BinaryIO, TypeAlias

import zstandard
from pyfastcdc import FastCDC

from tether.errors import CorruptChunk, PayloadTooLarge

SMALLEST = 256 << 10
MEAN = 1 << 20
LARGEST = 4 << 20
"""Bytes of a chunk. Only the last one of a file may have less than ``SMALLEST``. The broker's ``max_payload`` must
allow the largest."""

_ENOUGH = 2 * LARGEST
"""Bytes to gather before they are cut: what lies behind the last cut is looked at twice."""


ZSTD = "zstd"
"""What the stored form of a compressed chunk is called: one Zstandard frame (RFC 8878) that tells its content's size."""

WORTH = 0.1
"""The share of its bytes that compression must save of a chunk. Less is not worth the time that reading then takes."""

_LEVEL = 1
_SAMPLE = 8 << 10
"""Bytes at the start, in the middle and at the end of a chunk that are tried before the whole."""

Bytes: TypeAlias = bytes | memoryview
"""A chunk that is only read may be a view of the buffer that it was cut in."""


def compressed(chunk: Bytes) -> bytes | None:
    """The chunk as a Zstandard frame; None when that does not save enough of it. Blocks."""
    middle = len(chunk) // 2
    sample = b"".join((chunk[:_SAMPLE], chunk[middle : middle + _SAMPLE], chunk[-_SAMPLE:]))
    if len(chunk) > 2 * len(sample) and not _worth(sample):
        return None
    return _worth(chunk)


def _worth(content: Bytes) -> bytes | None:
    made = zstandard.ZstdCompressor(level=_LEVEL).compress(content)
    return made if len(made) <= len(content) * (1 - WORTH) else None


def decompressed(stored: bytes) -> bytes:
    """What :func:`compressed` made a frame of. Blocks.

    Raises:
        CorruptChunk: it is no frame, or one that says it holds more than a chunk may have; nothing of it was unpacked.
    """
    try:
        size = zstandard.get_frame_parameters(stored).content_size
        if not 0 < size <= LARGEST:
            raise CorruptChunk("a compressed chunk is larger than a chunk may be, or does not say how large it is")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk("a compressed chunk cannot be unpacked") from error


class Cutter:
    """Cuts one file that arrives in parts, and knows what it cut: each chunk's digest and size, and the file's SHA-256.

    Where it cuts does not depend on the parts. Without ``whole`` the file's is not taken, which spares the second hash of
    every byte.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._cdc = FastCDC(MEAN, min_size=SMALLEST, max_size=LARGEST)
        self._pending = b""
        self._whole = hashlib.sha256() if whole else None
        self.digests: list[str] = []
        self.sizes: list[int] = []

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file so far; empty when it is not taken."""
        return "" if self._whole is None else self._whole.hexdigest()

    def cut(self, parts: Iterable[bytes], *, last: bool = False) -> list[tuple[str, Bytes]]:
        """Digest and bytes of the chunks that ``parts`` complete; with ``last`` of all that are left. Blocks."""
        chunks = self.split(parts, last=last)
        self.add_whole(chunks)
        return self.named(chunks, digests_of(chunks))

    # the same in steps, each of which may run in another thread while the others do their part

    def split(self, parts: Iterable[bytes], *, last: bool = False) -> list[Bytes]:
        """The chunks that ``parts`` complete: views of one buffer that holds all of them. Blocks."""
        content = b"".join((self._pending, *parts))
        found = [(chunk.offset, chunk.length) for chunk in self._cdc.cut_buf(content)] if content else []
        if found and not last:
            found.pop()  # it ends where the buffer does; more bytes may belong to it
        end = sum(length for _, length in found)
        self._pending = content[end:]
        view = memoryview(content)
        return [view[start : start + length] for start, length in found]

    def add_whole(self, chunks: Sequence[Bytes]) -> None:
        """Go on with the hash of the whole. Blocks."""
        if self._whole is not None:
            for chunk in chunks:
                self._whole.update(chunk)

    def named(self, chunks: Sequence[Bytes], digests: Sequence[str]) -> list[tuple[str, Bytes]]:
        """Note the chunks that come next."""
        self.digests += digests
        self.sizes += map(len, chunks)
        return list(zip(digests, chunks, strict=True))


async def cut(body: AsyncIterator[bytes], limit: int, cutter: Cutter) -> AsyncIterator[tuple[str, Bytes]]:
    """Digest and bytes of a body's chunks, while it arrives: parts of it are hashed in threads while the next are split.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes came.
    """
    naming: asyncio.Task[list[tuple[str, Bytes]]] | None = None
    try:
        async for parts in _with_last(_gathered(body, limit)):
            split = await asyncio.to_thread(cutter.split, parts or (), last=parts is None)
            found = [] if naming is None else await naming
            naming = asyncio.create_task(_named(cutter, split), name="name-chunks")
            for chunk in found:
                yield chunk
        for chunk in [] if naming is None else await naming:
            yield chunk
    finally:
        if naming is not None:
            await asyncio.wait({naming})


async def _named(cutter: Cutter, chunks: list[Bytes]) -> list[tuple[str, Bytes]]:
    middle = len(chunks) // 2
    _, first, second = await asyncio.gather(
        asyncio.to_thread(cutter.add_whole, chunks),
        asyncio.to_thread(digests_of, chunks[:middle]),
        asyncio.to_thread(digests_of, chunks[middle:]),
    )
    return cutter.named(chunks, first + second)


async def _with_last(parts: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes] | None]:
    """What comes, and None at the end."""
    async for part in parts:
        yield part
    yield None


async def _gathered(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[list[bytes]]:
    parts: list[bytes] = []
    total = size = 0
    async for part in body:
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(
                f"the model file has more than {limit} bytes, the most this platform takes", field="body"
            )
        parts.append(part)
        size += len(part)
        if size >= _ENOUGH:
            yield parts
            parts, size = [], 0
    if parts:
        yield parts


def cut_file(file: BinaryIO) -> Cutter:
    """Cut a file without keeping its chunks: what is known afterwards is the cutter's. Blocks."""
    cutter = Cutter()
    while part := file.read(_ENOUGH):
        cutter.cut((part,))
    cutter.cut((), last=True)
    return cutter


def digest_of(chunk: Bytes) -> str:
    """The name of a chunk: the hex SHA-256 of its bytes."""
    return hashlib.sha256(chunk).hexdigest()


def digests_of(chunks: Iterable[Bytes]) -> list[str]:
    """:func:`digest_of` of each. Blocks."""
    return [digest_of(chunk) for chunk in chunks]
