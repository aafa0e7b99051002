"""Compression of chunks: only where it pays, and no frame unpacks to more than a chunk may have."""

from __future__ import annotations

import random
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import zstandard

from tether.domain.chunking import LARGEST, WORTH, compressed, decompressed
from tether.errors import CorruptChunk

MB = 1 << 20


def normal(count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(4).standard_normal(count, dtype=np.float32)


@pytest.mark.parametrize(
    ("chunk", "pays"),
    [
        (random.Random(1).randbytes(MB), False),
        (normal(MB // 4).tobytes(), False),
        (normal(MB // 2).astype(ml_dtypes.bfloat16).tobytes(), True),
        (normal(MB // 4).astype(ml_dtypes.bfloat16).astype(np.float32).tobytes(), True),
        (bytes(LARGEST), True),
        (b"a", False),
        (b"", False),
        (b"ab" * 200, True),
    ],
    ids=["noise", "fp32", "bf16", "bf16 in fp32", "zeros", "one byte", "nothing", "short"],
)
def test_a_chunk_is_compressed_where_that_saves_a_tenth(chunk: bytes, pays: bool) -> None:
    found = compressed(chunk)
    assert (found is not None) is pays
    if found is not None:
        assert len(found) <= (1 - WORTH) * len(chunk)
        assert decompressed(found) == chunk


def test_a_sample_that_promises_too_much_is_not_believed() -> None:
    """Start, middle and end are zeros and everything else is noise."""
    chunk = bytearray(random.Random(2).randbytes(2 * MB))
    for start in (0, MB, len(chunk) - 32_768):
        chunk[start : start + 32_768] = bytes(32_768)
    assert compressed(bytes(chunk)) is None


def frame_of(size: int) -> bytes:
    """A frame that unpacks to ``size`` zeros, and says so."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


def test_a_bomb_is_refused_before_anything_is_unpacked() -> None:
    bomb = frame_of(256 * MB)
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(CorruptChunk, match="maximum chunk size"):
        decompressed(bomb)
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()
    assert len(decompressed(frame_of(LARGEST))) == LARGEST
    with pytest.raises(CorruptChunk):
        decompressed(frame_of(LARGEST + 1))


def lying(size: int, claimed: int) -> bytes:
    """A frame whose header claims another size than it unpacks to: the eight-byte form of RFC 8878, 3.1.1.1."""
    honest = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(size))
    descriptor = honest[4]
    assert descriptor >> 6 == 0, "no content size"
    assert not descriptor & 0x20, "a window descriptor"
    return honest[:4] + bytes([descriptor | 0xC0]) + honest[5:6] + struct.pack("<Q", claimed) + honest[6:]


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"no frame at all",
        frame_of(1000)[:-3],
        frame_of(1000) + b"x",
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
        lying(256 * MB, 1000),
        lying(1000, 2000),
    ],
    ids=["empty", "other", "torn", "more", "no size", "larger than it says", "smaller than it says"],
)
def test_what_is_no_frame_of_a_chunk_is_refused(stored: bytes) -> None:
    with pytest.raises(CorruptChunk):
        decompressed(stored)
