"""Content-defined chunking: boundaries depend on the bytes around them, not on their offset in the file.

So an insertion or deletion changes only the chunks that it falls into. The algorithm is FastCDC (Xia et al.,
"The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems", IEEE TPDS 2020),
as in the library pyfastcdc, with its published gear table and normalisation level 1. Client and gateway cut
identically.
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
"""Sizes of a chunk in bytes. Only a file's last chunk may be smaller than ``SMALLEST``. The broker's
``max_payload`` must allow the largest."""

_ENOUGH = 2 * LARGEST
"""Bytes to collect before cutting: the bytes after the last boundary are processed twice."""


ZSTD = "zstd"
"""Name of the compressed form: one Zstandard frame (RFC 8878) with its content's size."""

WORTH = 0.1
"""Fraction of a chunk that compression must save to be worth the time of decompression."""

_LEVEL = 1
_SAMPLE = 8 << 10
"""Bytes at the start, middle and end of a chunk that are compressed as a trial."""

Bytes: TypeAlias = bytes | memoryview
"""A read-only chunk may be a view of the buffer that it was cut from."""


def compressed(chunk: Bytes) -> bytes | None:
    """Return the chunk as a Zstandard frame; None if that does not save enough. Blocks."""
    middle = len(chunk) // 2
    sample = b"".join((chunk[:_SAMPLE], chunk[middle : middle + _SAMPLE], chunk[-_SAMPLE:]))
    if len(chunk) > 2 * len(sample) and not _worth(sample):
        return None
    return _worth(chunk)


def _worth(content: Bytes) -> bytes | None:
    made = zstandard.ZstdCompressor(level=_LEVEL).compress(content)
    return made if len(made) <= len(content) * (1 - WORTH) else None


def decompressed(stored: bytes) -> bytes:
    """Return the content of a frame of :func:`compressed`. Blocks.

    Raises:
        CorruptChunk: it is not a frame, or declares more than a chunk's size; nothing was decompressed.
    """
    try:
        size = zstandard.get_frame_parameters(stored).content_size
        if not 0 < size <= LARGEST:
            raise CorruptChunk("a compressed chunk exceeds the maximum chunk size, or does not declare its size")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk("a compressed chunk cannot be decompressed") from error


class Cutter:
    """Cuts one file that arrives in parts; collects digest and size of each chunk, and the file's SHA-256.

    Boundaries do not depend on the parts. Without ``whole`` the file's digest is omitted, which saves hashing
    every byte twice.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._cdc = FastCDC(MEAN, min_size=SMALLEST, max_size=LARGEST)
        self._pending = b""
        self._whole = hashlib.sha256() if whole else None
        self.digests: list[str] = []
        self.sizes: list[int] = []

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file so far; empty if omitted."""
        return "" if self._whole is None else self._whole.hexdigest()

    def cut(self, parts: Iterable[bytes], *, last: bool = False) -> list[tuple[str, Bytes]]:
        """Return digest and bytes of the chunks that ``parts`` complete; with ``last``, of all remaining
        ones. Blocks."""
        chunks = self.split(parts, last=last)
        self.add_whole(chunks)
        return self.named(chunks, digests_of(chunks))

    # the same in steps, which may run in separate threads

    def split(self, parts: Iterable[bytes], *, last: bool = False) -> list[Bytes]:
        """Return the chunks that ``parts`` complete, as views of one buffer. Blocks."""
        content = b"".join((self._pending, *parts))
        found = [(chunk.offset, chunk.length) for chunk in self._cdc.cut_buf(content)] if content else []
        if found and not last:
            found.pop()  # it ends with the buffer; more bytes may belong to it
        end = sum(length for _, length in found)
        self._pending = content[end:]
        view = memoryview(content)
        return [view[start : start + length] for start, length in found]

    def add_whole(self, chunks: Sequence[Bytes]) -> None:
        """Add chunks to the file's digest. Blocks."""
        if self._whole is not None:
            for chunk in chunks:
                self._whole.update(chunk)

    def named(self, chunks: Sequence[Bytes], digests: Sequence[str]) -> list[tuple[str, Bytes]]:
        """Record the next chunks with their digests."""
        self.digests += digests
        self.sizes += map(len, chunks)
        return list(zip(digests, chunks, strict=True))


async def cut(body: AsyncIterator[bytes], limit: int, cutter: Cutter) -> AsyncIterator[tuple[str, Bytes]]:
    """Yield digest and bytes of a body's chunks as it arrives; hash parts in threads while cutting the next.

    Raises:
        PayloadTooLarge: the body has more than ``limit`` bytes.
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
    """Yield all parts, then None."""
    async for part in parts:
        yield part
    yield None


async def _gathered(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[list[bytes]]:
    parts: list[bytes] = []
    total = size = 0
    async for part in body:
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(f"the model file is larger than {limit} bytes, this platform's maximum", field="body")
        parts.append(part)
        size += len(part)
        if size >= _ENOUGH:
            yield parts
            parts, size = [], 0
    if parts:
        yield parts


def cut_file(file: BinaryIO) -> Cutter:
    """Cut a file; return the cutter with digests and sizes, without the chunks. Blocks."""
    cutter = Cutter()
    while part := file.read(_ENOUGH):
        cutter.cut((part,))
    cutter.cut((), last=True)
    return cutter


def digest_of(chunk: Bytes) -> str:
    """Return the name of a chunk: the hex SHA-256 of its bytes."""
    return hashlib.sha256(chunk).hexdigest()


def digests_of(chunks: Iterable[Bytes]) -> list[str]:
    """Return :func:`digest_of` of each chunk. Blocks."""
    return [digest_of(chunk) for chunk in chunks]
