"""A worker's cache of chunks: it may lose anything and never hands out anything wrong, whatever happens to its file."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tether.domain.chunking import digest_of
from tether.errors import ConfigError
from tether.process import metrics
from tether.worker.files import lmdb_chunks
from tether.worker.files.chunk_cache import ChunkCache
from tether.worker.files.lmdb_chunks import DATA, Full, LmdbChunks

MB = 1 << 20


def chunks(count: int, seed: int = 0, size: int = MB) -> list[tuple[str, bytes]]:
    rng = random.Random(seed)
    made = [rng.randbytes(size - rng.randrange(size // 2)) for _ in range(count)]
    return [(digest_of(chunk), chunk) for chunk in made]


def names(some: Sequence[tuple[str, bytes]]) -> list[str]:
    return [digest for digest, _ in some]


@contextmanager
def opened(folder: Path, budget: int = 64 * MB, reserve: int = 0) -> Iterator[ChunkCache]:
    cache = ChunkCache(folder / "chunks", budget, reserve)
    try:
        yield cache
    finally:
        cache.close()


def filled(folder: Path, some: Sequence[tuple[str, bytes]]) -> Path:
    """A file with these chunks, closed in order."""
    with opened(folder) as cache:
        assert cache.keep(some) == sum(len(chunk) for _, chunk in some)
    return folder / "chunks" / DATA


def lost(reason: str) -> float:
    return float(metrics.CHUNK_CACHE_LOST.labels(reason)._value.get())


def intact(cache: ChunkCache, some: Sequence[tuple[str, bytes]]) -> int:
    """How many are still there; what is there must be right."""
    found = {digest: cache.read(digest) for digest in names(some)}
    assert all(found[digest] in (None, chunk) for digest, chunk in some)
    return sum(chunk is not None for chunk in found.values())


def test_chunks_are_there_after_a_restart_in_a_private_folder(tmp_path: Path) -> None:
    some = chunks(10)
    data = filled(tmp_path, some)
    with opened(tmp_path) as cache:
        assert cache.held([*names(some), digest_of(b"another")]) == set(names(some))
        assert intact(cache, some) == 10
        assert cache.size == sum(len(chunk) for _, chunk in some)
    assert data.parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in data.parent.iterdir() if path.name != "state"} == {0}


def test_a_chunk_that_is_not_what_its_digest_says_is_not_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        assert cache.keep([(digest_of(b"one"), b"another")]) == 0
        assert cache.held([digest_of(b"one")]) == set()


def test_what_was_not_used_for_the_longest_time_makes_room_also_after_a_restart(tmp_path: Path) -> None:
    old, used, new = chunks(8, 1), chunks(8, 2), chunks(5, 3)
    with opened(tmp_path, 16 * MB) as cache:
        cache.keep([*used, *old][:14])
        assert intact(cache, used) == 8
    with opened(tmp_path, 16 * MB) as cache:
        cache.keep(new)
        assert (intact(cache, used), intact(cache, new)) == (8, 5)
        assert intact(cache, old) < 6


def test_the_file_stays_in_its_budget_however_much_goes_through_it(tmp_path: Path) -> None:
    budget = 32 * MB
    before = lost("full")
    with opened(tmp_path, budget) as cache:
        for seed in range(40):
            newest = chunks(10, seed)
            cache.keep(newest)
            assert intact(cache, newest) == 10
            assert (tmp_path / "chunks" / DATA).stat().st_size <= budget
        assert cache.size > budget / 2
    assert lost("full") == before


def test_a_model_larger_than_the_budget_is_kept_in_part_and_does_not_chase_itself_out(tmp_path: Path) -> None:
    many = chunks(40)
    with opened(tmp_path, 16 * MB) as cache:
        kept = cache.keep(many)
        assert 8 * MB < kept < 12 * MB
        assert intact(cache, many[:8]) == 8


def flip(data: bytes) -> bytes:
    rng = random.Random(5)
    changed = bytearray(data)
    for _ in range(len(data) // 10_000):
        changed[rng.randrange(len(data))] ^= 0xFF
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bytes flipped everywhere": flip,
    "a byte of a chunk": lambda data: data[: 5 * MB] + bytes([data[5 * MB] ^ 1]) + data[5 * MB + 1 :],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut inside a page": lambda data: data[: len(data) - 5000],
    "cut to its first pages": lambda data: data[:8192],
    "cut to nothing": lambda _: b"",
    "zeroed": lambda data: bytes(len(data)),
    "zeroed behind its first pages": lambda data: data[:8192] + bytes(len(data) - 8192),
    "its second half zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "no LMDB file": lambda data: b"GIF89a" * (len(data) // 6),
    "another magic number": lambda data: data[:16] + b"\xff\xff\xff\xff" + data[20:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_the_cache_works_again(tmp_path: Path, damage: str) -> None:
    some = chunks(12)
    data = filled(tmp_path, some)
    data.write_bytes(DAMAGE[damage](data.read_bytes()))
    with opened(tmp_path) as cache:
        assert intact(cache, some) < 12
        cache.keep(some)
        assert intact(cache, some) == 12


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_that_no_clock_tells_of_are_survived(tmp_path: Path, seed: int) -> None:
    """As a disk that decays: size and times of the file are those of an orderly end. Only chunks are hit, not the tree."""
    some = chunks(6, seed)
    data = filled(tmp_path, some)
    found = data.stat()
    content = data.read_bytes()
    at = content.index(some[seed % 6][1][:4096]) + seed * 100
    with data.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 0x40]))
    os.utime(data, ns=(found.st_atime_ns, found.st_mtime_ns))
    before = lost("chunk")
    with opened(tmp_path) as cache:
        assert intact(cache, some) == 5
        assert cache.keep(some) == len(some[seed % 6][1])
        assert intact(cache, some) == 6
    assert lost("chunk") == before + 1


def test_a_file_that_kills_its_reader_kills_only_the_child_that_tries_it(tmp_path: Path) -> None:
    some = chunks(20)
    data = filled(tmp_path, some)
    size = data.stat().st_size
    os.truncate(data, size // 2)
    program = [sys.executable, "-I", lmdb_chunks.__file__, str(data.parent), str(64 * MB), "whole"]
    assert subprocess.run(program, capture_output=True, check=False).returncode == -signal.SIGBUS
    before = lost("damaged")
    with opened(tmp_path) as cache:
        assert cache.held(names(some)) == set()
        assert cache.keep(some) == sum(len(chunk) for _, chunk in some)
    assert lost("damaged") == before + 1


def test_a_file_that_was_cut_short_unseen_is_gone_through_as_a_whole(tmp_path: Path) -> None:
    some = chunks(20)
    data = filled(tmp_path, some)
    os.truncate(data, data.stat().st_size - 3 * MB)
    found = data.stat()
    (data.parent / "state").write_text(f"closed {(found.st_ino, found.st_size, found.st_mtime_ns)}")
    with opened(tmp_path) as cache:
        assert cache.held(names(some)) == set()


def test_a_file_that_is_full_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    small = LmdbChunks(folder, 2 * MB)
    with pytest.raises(Full):
        small.put(chunks(1, size=4 * MB), ())
    small.close()
    before = lost("full")
    with opened(tmp_path, 8 * MB) as cache:
        cache.keep(chunks(2))
        cache._capacity = 64 * MB
        cache.keep(chunks(30, 7))
        assert lost("full") == before + 1
        some = chunks(4, 8)
        cache.keep(some)
        assert intact(cache, some) == 4


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    some = chunks(12)
    with opened(tmp_path) as cache:
        with file_size_limit(4 * MB):
            cache.keep(some)
            assert intact(cache, some) < 12
        cache.keep(some)
        assert intact(cache, some) == 12


def test_no_cache_where_the_disk_has_no_room_or_none_is_wanted(tmp_path: Path) -> None:
    some = chunks(2)
    with opened(tmp_path, reserve=1 << 60) as cache:
        assert (cache.keep(some), cache.held(names(some))) == (0, set())
    with opened(tmp_path / "none", 0) as cache:
        assert (cache.keep(some), cache.held(names(some))) == (0, set())
    assert not (tmp_path / "none").exists()


def test_a_smaller_budget_makes_the_file_anew(tmp_path: Path) -> None:
    data = filled(tmp_path, chunks(30))
    with opened(tmp_path, 8 * MB) as cache:
        cache.keep(chunks(2, 9))
        assert data.stat().st_size <= 8 * MB


def test_only_one_has_the_file_at_a_time_and_a_forked_process_has_none(tmp_path: Path) -> None:
    some = chunks(3)
    with opened(tmp_path) as first:
        first.keep(some)
        with opened(tmp_path) as second:
            assert (second.held(names(some)), second.keep(some)) == (set(), 0)
            second.drop("disk")
        child = os.fork()
        if child == 0:
            os._exit(first.held(names(some)) != set() or first.read(some[0][0]) is not None)
        assert os.waitpid(child, 0)[1] == 0
        assert intact(first, some) == 3
    with opened(tmp_path) as second:
        assert intact(second, some) == 3


KILLED = """
import os, pathlib, signal, sys
from tether.domain.chunking import digest_of
from tether.worker.files.chunk_cache import ChunkCache
cache = ChunkCache(pathlib.Path(sys.argv[1]), 64 << 20, 0)
cache.keep([(digest_of(chunk), chunk) for chunk in (bytes([n]) * 300_000 for n in range(8))])
cache.held([])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_file_is_read_as_a_whole_and_after_three_it_is_not_trusted(tmp_path: Path) -> None:
    some = [(digest_of(chunk), chunk) for chunk in (bytes([n]) * 300_000 for n in range(8))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    program = [sys.executable, "-c", KILLED, str(tmp_path / "chunks")]

    def killed() -> None:
        assert subprocess.run(program, env=environment, check=False).returncode == -signal.SIGKILL

    killed()
    with opened(tmp_path) as cache:
        assert intact(cache, some) == 8
    for _ in range(3):
        killed()
    before = lost("suspected")
    with opened(tmp_path) as cache:
        assert intact(cache, some) == 0
        cache.keep(some)
    assert lost("suspected") == before + 1
    with opened(tmp_path) as cache:
        assert intact(cache, some) == 8


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        ChunkCache(tmp_path / "chunks", 64 * MB, 0)


def test_it_can_be_deleted_at_any_time(tmp_path: Path) -> None:
    some = chunks(5)
    with opened(tmp_path) as cache:
        cache.keep(some)
        cache.rest()
        for path in (tmp_path / "chunks").iterdir():
            path.unlink()
        assert intact(cache, some) == 0
        cache.keep(some)
        assert intact(cache, some) == 5
        shutil.rmtree(tmp_path / "chunks")
        cache.rest()
        cache.keep(some)
        assert intact(cache, some) == 5
        cache.drop("disk")
        assert cache.size == 0
        assert not (tmp_path / "chunks" / DATA).exists()
        cache.keep(some)
        assert intact(cache, some) == 5
