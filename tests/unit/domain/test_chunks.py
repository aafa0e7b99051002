"""Content-defined cutting."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tether.domain.chunking import LARGEST, SMALLEST, Bytes, Cutter, cut, cut_file, digest_of
from tether.errors import PayloadTooLarge

MB = 1 << 20
CONTENT = random.Random(1).randbytes(24 * MB + 99)


async def torn(content: bytes, most: int = 200_000, seed: int = 2) -> AsyncIterator[bytes]:
    """The content in parts of any size."""
    position, sizes = 0, random.Random(seed)
    while position < len(content):
        step = sizes.randint(0, most)
        yield content[position : position + step]
        position += step


async def chunks_of(content: bytes, **how: int) -> tuple[list[Bytes], Cutter]:
    cutter = Cutter()
    return [chunk async for _, chunk in cut(torn(content, **how), 1 << 30, cutter)], cutter


async def test_chunks_make_up_the_content_and_are_named_by_it() -> None:
    chunks, cutter = await chunks_of(CONTENT)
    assert b"".join(chunks) == CONTENT
    assert cutter.digests == [digest_of(chunk) for chunk in chunks]
    assert cutter.sizes == [len(chunk) for chunk in chunks]
    assert cutter.digest == hashlib.sha256(CONTENT).hexdigest()
    assert all(SMALLEST <= size <= LARGEST for size in cutter.sizes[:-1])
    assert MB // 2 < len(CONTENT) / len(chunks) < 2 * MB


async def test_where_it_is_cut_does_not_depend_on_how_it_arrives(tmp_path: Path) -> None:
    _, one = await chunks_of(CONTENT)
    _, other = await chunks_of(CONTENT, most=7 * MB, seed=3)
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        assert one.digests == other.digests == cut_file(file).digests


async def test_the_cuts_are_those_that_stored_models_were_cut_with() -> None:
    """Another version of the library, or other sizes, would make every stored chunk useless for the next push."""
    _, cutter = await chunks_of(CONTENT)
    assert cutter.sizes[:4] == [1521776, 1829765, 518824, 1607681]


@pytest.mark.parametrize("where", [0, 5 * MB, 12 * MB + 1, len(CONTENT)])
@pytest.mark.parametrize("inserted", [1, 1000, 300_000])
async def test_an_insertion_changes_only_the_chunks_around_it(where: int, inserted: int) -> None:
    _, before = await chunks_of(CONTENT)
    changed = CONTENT[:where] + random.Random(4).randbytes(inserted) + CONTENT[where:]
    _, after = await chunks_of(changed)
    assert len(set(after.digests) - set(before.digests)) <= 4


@pytest.mark.parametrize("size", [0, 1, SMALLEST, LARGEST, 2 * LARGEST, 2 * LARGEST + 1])
async def test_monotonous_content_is_cut_too(size: int) -> None:
    chunks, cutter = await chunks_of(bytes(size), most=3 * MB)
    assert b"".join(chunks) == bytes(size)
    assert all(0 < length <= LARGEST for length in cutter.sizes)


async def test_a_body_over_its_limit_ends_there() -> None:
    with pytest.raises(PayloadTooLarge, match="larger than 10 bytes"):
        _ = [chunk async for chunk in cut(torn(bytes(11), most=4), 10, Cutter())]
