"""Content-defined cutting: where a file is cut depends on the bytes around the cut, not on how far in they are.

So bytes that are put in or taken out change the pieces they fall into, and no others. The algorithm is FastCDC (Xia et
al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems", IEEE TPDS 2020), as the
library pyfastcdc has it, with its published gear table and normalisation level 1. Client and gateway cut alike.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import zstandard
from pyfastcdc import FastCDC

from tether.errors import CorruptChunk, PayloadTooLarge

SMALLEST = 256 << 10
MEAN = 1 << 20
LARGEST = 4 << 20
"""Bytes of a piece. Only the last one of a file may have less than ``SMALLEST``. The broker's ``max_payload`` must
allow the largest."""

_ENOUGH = 2 * LARGEST
"""Bytes to gather before they are cut: what lies behind the last cut is looked at twice."""


ZSTD = "zstd"
"""What the stored form of a compressed piece is called: one Zstandard frame (RFC 8878) that tells its content's size."""

WORTH = 0.1
"""The share of its bytes that compression must save of a piece. Less is not worth the time that reading then takes."""

_LEVEL = 1
_SAMPLE = 32 << 10
"""Bytes at the start, in the middle and at the end of a piece that are tried before the whole."""


def compressed(piece: bytes) -> bytes | None:
    """The piece as a Zstandard frame; None when that does not save enough of it. Blocks."""
    middle = len(piece) // 2
    sample = b"".join((piece[:_SAMPLE], piece[middle : middle + _SAMPLE], piece[-_SAMPLE:]))
    if len(piece) > 2 * len(sample) and not _worth(sample):
        return None
    return _worth(piece)


def _worth(content: bytes) -> bytes | None:
    made = zstandard.ZstdCompressor(level=_LEVEL).compress(content)
    return made if len(made) <= len(content) * (1 - WORTH) else None


def decompressed(stored: bytes) -> bytes:
    """What :func:`compressed` made a frame of. Blocks.

    Raises:
        CorruptChunk: it is no frame, or one that says it holds more than a piece may have; nothing of it was unpacked.
    """
    try:
        size = zstandard.get_frame_parameters(stored).content_size
        if not 0 < size <= LARGEST:
            raise CorruptChunk("a compressed piece is larger than a piece may be, or does not say how large it is")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk("a compressed piece cannot be unpacked") from error


class Cutter:
    """Cuts one file that arrives in parts, and knows what it cut: each piece's digest and size, and the whole's hash.

    Where it cuts does not depend on the parts.
    """

    def __init__(self) -> None:
        self._cdc = FastCDC(MEAN, min_size=SMALLEST, max_size=LARGEST)
        self._pending = bytearray()
        self.whole = hashlib.sha256()
        self.digests: list[str] = []
        self.sizes: list[int] = []

    def cut(self, parts: Iterable[bytes], *, last: bool = False) -> list[tuple[str, bytes]]:
        """Digest and bytes of the pieces that ``parts`` complete; with ``last`` of all that are left. Blocks."""
        pieces = self.split(parts, last=last)
        self.add_whole(pieces)
        return self.named(pieces, digests_of(pieces))

    # the same in steps, each of which may run in another thread while the others do their part

    def split(self, parts: Iterable[bytes], *, last: bool = False) -> list[bytes]:
        """The pieces that ``parts`` complete. Blocks."""
        for part in parts:
            self._pending += part
        with memoryview(self._pending) as pending:
            found = [(chunk.offset, chunk.length) for chunk in self._cdc.cut_buf(pending)] if pending else []
            if found and not last:
                found.pop()  # it ends where the buffer does; more bytes may belong to it
            pieces = [bytes(pending[start : start + length]) for start, length in found]
        del self._pending[: sum(length for _, length in found)]
        return pieces

    def add_whole(self, pieces: Sequence[bytes]) -> None:
        """Go on with the hash of the whole. Blocks."""
        for piece in pieces:
            self.whole.update(piece)

    def named(self, pieces: Sequence[bytes], digests: Sequence[str]) -> list[tuple[str, bytes]]:
        """Note the pieces that come next."""
        self.digests += digests
        self.sizes += map(len, pieces)
        return list(zip(digests, pieces, strict=True))


async def cut(body: AsyncIterator[bytes], limit: int, cutter: Cutter) -> AsyncIterator[tuple[str, bytes]]:
    """Digest and bytes of a body's pieces, while it arrives: parts of it are hashed in threads while the next are split.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes came.
    """
    naming: asyncio.Task[list[tuple[str, bytes]]] | None = None
    try:
        async for parts in _with_last(_gathered(body, limit)):
            split = await asyncio.to_thread(cutter.split, parts or (), last=parts is None)
            found = [] if naming is None else await naming
            naming = asyncio.create_task(_named(cutter, split), name="name-pieces")
            for piece in found:
                yield piece
        for piece in [] if naming is None else await naming:
            yield piece
    finally:
        if naming is not None:
            await asyncio.wait({naming})


async def _named(cutter: Cutter, pieces: list[bytes]) -> list[tuple[str, bytes]]:
    middle = len(pieces) // 2
    _, first, second = await asyncio.gather(
        asyncio.to_thread(cutter.add_whole, pieces),
        asyncio.to_thread(digests_of, pieces[:middle]),
        asyncio.to_thread(digests_of, pieces[middle:]),
    )
    return cutter.named(pieces, first + second)


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


def cut_file(path: Path) -> Cutter:
    """Cut a file without keeping its pieces: what is known afterwards is the cutter's. Blocks."""
    cutter = Cutter()
    with path.open("rb") as file:
        while part := file.read(_ENOUGH):
            cutter.cut((part,))
    cutter.cut((), last=True)
    return cutter


def digest_of(piece: bytes) -> str:
    """The name of a piece: the hex SHA-256 of its bytes."""
    return hashlib.sha256(piece).hexdigest()


def digests_of(pieces: Iterable[bytes]) -> list[str]:
    """:func:`digest_of` of each. Blocks."""
    return [digest_of(piece) for piece in pieces]
