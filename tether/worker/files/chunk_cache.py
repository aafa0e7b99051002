"""A worker's cache of model file chunks. Disposable: without it, chunks are downloaded again.

So a failure of the cache is not an error: a damaged or full file is deleted and recreated, and if that fails,
there is no cache for a while. See docs/adr/0017-worker-cache.md.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tether.domain.chunking import digest_of
from tether.process import metrics
from tether.process.data_dir import check_folder, private_folder
from tether.worker.files import lmdb_chunks
from tether.worker.files.lmdb_chunks import DATA, Damaged, Full, LmdbChunks

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH = 8 << 20
"""Maximum bytes of chunks stored in one transaction."""
_FILLED = 0.75
"""Fraction of the file that chunks may fill; the rest is for pages that LMDB cannot reuse yet."""
_LEAST = 4 << 20
"""Minimum size in bytes of a useful file."""
_TRY_S = 120.0
"""Seconds that the check of a file may take."""
_MAPPED = 48 << 20
"""Bytes read after which the file is reopened: pages read through its mapping count as memory."""
_UNCLEAN = 3
"""Unclean shutdowns in a row after which the file is checked as a whole."""


Opened = Callable[[str, bytes], bytes | None]
"""Decode a stored chunk of a given name; None if it is not what was stored. Blocks."""


def intact(digest: str, chunk: bytes) -> bytes | None:
    """Return a chunk stored as plain bytes if its digest matches."""
    return chunk if digest_of(chunk) == digest else None


def as_it_is(digest: str, chunk: bytes) -> bytes | None:
    """Return a chunk unchecked; its digest matched just now."""
    del digest
    return chunk


class ChunkCache:
    """Chunks by digest, in a file of at most ``budget`` bytes that leaves ``reserve`` bytes of the disk free.

    The file is opened on first use, by one process at a time; another process with the same folder has no
    cache. All methods block and are thread-safe. A forked child has no cache.

    Raises:
        ConfigError: others may write into the folder.
    """

    def __init__(self, folder: Path, budget: int, reserve: int) -> None:
        self._folder = folder
        self._budget = budget
        self._reserve = reserve
        self._lock = threading.RLock()
        self._lock_file: int | None = None
        self._db: LmdbChunks | None = None
        self._owner = 0
        self._mapped = 0
        self._map_size = 0
        self._left: tuple[int, ...] = ()
        self._closed = False
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._capacity = 0
        self._bytes = 0
        self._clock = 0
        self._touched: set[str] = set()
        if budget:
            private_folder(folder)
            check_folder(folder)

    @property
    def size(self) -> int:
        """Return the bytes of the stored chunks."""
        return self._bytes

    def held(self, digests: Iterable[str]) -> set[str]:
        """Return those of ``digests`` that are stored; their integrity is checked on read."""
        with self._lock:
            found = [digest for digest in digests if digest in self._sizes] if self._opened() else []
            for digest in found:
                self._use(digest)
            return set(found)

    def read(self, digest: str, opened: Opened = intact) -> bytes | None:
        """Return a chunk decoded by ``opened``; None if it is missing or damaged."""
        with self._lock:
            if self._opened() is None or digest not in self._sizes:
                return None
            chunk = self._guarded(lambda db: db.get(digest))
            self._unmap(len(chunk or b""))
            self._use(digest)
        found = None if chunk is None else opened(digest, chunk)
        if found is None:
            self._forget(digest)
        return found

    def keep(self, chunks: Iterable[tuple[str, bytes]], opened: Opened = intact) -> int:
        """Store new chunks that ``opened`` finds intact; return their bytes.

        Least recently used chunks are evicted. If not all fit, some are stored.
        """
        with self._lock:
            if self._opened() is None:
                return 0
        batch: dict[str, bytes] = {}
        fresh: set[str] = set()
        kept = size = 0
        for digest, chunk in chunks:
            if digest in self._sizes or digest in batch or opened(digest, chunk) is None:
                continue
            batch[digest] = chunk
            size += len(chunk)
            if size >= min(BATCH, self._capacity // 8):
                if not self._store(batch, fresh):
                    return kept
                kept += size
                batch, size = {}, 0
        return kept + size if batch and self._store(batch, fresh) else kept

    def drop(self, reason: str) -> None:
        """Delete the file; the next use recreates it. ``reason`` is one word for the metric."""
        with self._lock, suppress(OSError):
            if self._budget and self._locked():
                self._close_db()
                self._delete(reason)

    def rest(self) -> None:
        """Close the file cleanly until the next use."""
        with self._lock:
            if not self._mine():
                return
            if rows := self._rows({}):
                self._guarded(lambda db: db.put((), rows))
            if self._db is not None:
                self._close_db()
                with suppress(OSError):  # the disk is full, or the file was deleted
                    self._left = self._fingerprint()
                    self._state.write_text(f"closed {self._left}")

    def close(self) -> None:
        """Close the file for good; later calls of other threads find nothing."""
        self._closed = True
        with self._lock:
            self.rest()
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def _store(self, batch: dict[str, bytes], fresh: set[str]) -> bool:
        """Store a batch. Return False if it fits only by evicting what the same call stored."""
        with self._lock:
            if self._opened() is None:
                return False
            new = {digest: chunk for digest, chunk in batch.items() if digest not in self._sizes}
            fresh.update(batch)
            if not self._make_room(sum(map(len, new.values())), fresh):
                return False
            rows = self._rows(batch)
            self._guarded(lambda db: db.put(new.items(), rows))
            if self._db is None:
                return False
            for digest, chunk in batch.items():
                self._sizes[digest] = len(chunk)
                self._sizes.move_to_end(digest)
            self._count(sum(map(len, new.values())))
            return True

    def _make_room(self, size: int, fresh: set[str]) -> bool:
        gone: list[str] = []
        freed = 0
        for digest, length in self._sizes.items():
            if self._bytes - freed + size <= self._capacity:
                break
            if digest not in fresh:
                gone.append(digest)
                freed += length
        if self._bytes - freed + size > self._capacity:
            return False
        if gone:
            self._guarded(lambda db: db.delete(gone))
            for digest in gone:
                self._sizes.pop(digest, None)
            self._count(-freed if self._db is not None else 0)
        return self._db is not None

    def _rows(self, batch: dict[str, bytes]) -> list[tuple[str, int, int]]:
        """Return sizes and last uses to write: of chunks read since the last write, and of a batch."""
        read = {digest: size for digest, size in self._sizes.items() if digest in self._touched}
        self._touched.clear()
        read.update({digest: len(chunk) for digest, chunk in batch.items()})
        first = self._clock + 1
        self._clock += len(read)
        return [(digest, size, stamp) for stamp, (digest, size) in enumerate(read.items(), first)]

    def _use(self, digest: str) -> None:
        if digest in self._sizes:
            self._sizes.move_to_end(digest)
            self._touched.add(digest)

    def _forget(self, digest: str) -> None:
        with self._lock:
            if digest in self._sizes:
                log.warning("a cached chunk was damaged", extra={"action": "cache_chunk_damaged"})
                metrics.CHUNK_CACHE_LOST.labels("chunk").inc()
                self._guarded(lambda db: db.delete([digest]))
                self._count(-self._sizes.pop(digest, 0))

    def _count(self, change: int) -> None:
        self._bytes += change
        metrics.CHUNK_CACHE_BYTES.set(self._bytes)

    def _guarded(self, work: Callable[[LmdbChunks], T]) -> T | None:
        """Call ``work`` with the file; delete the file if it turns out damaged or full."""
        if self._db is None:
            return None
        try:
            return work(self._db)
        except Full as error:
            self._lost("full", error)
        except Damaged as error:
            self._lost("damaged", error)
        return None

    def _lost(self, reason: str, error: Exception) -> None:
        log.warning("recreated the chunk cache: %s", error, extra={"action": "cache_lost"})
        self._close_db()
        self._delete(reason)

    def _mine(self) -> bool:
        return self._db is not None and self._owner == os.getpid()

    def _opened(self) -> LmdbChunks | None:
        if self._db is not None:
            return self._db if self._mine() else None
        if self._closed or not self._budget:
            return None
        try:
            self._open()
        except (OSError, Full, Damaged) as error:
            self._close_db()
            self._delete("unusable")
            log.warning("chunk cache unavailable: %s", error, extra={"action": "cache_unusable"})
        return self._db

    def _open(self) -> None:
        """Open the file if no other process has it, the disk has space, and it is intact.

        Raises:
            OSError, Full, Damaged: it cannot be used.
        """
        private_folder(self._folder)
        if not self._locked():
            log.warning("another process uses the chunk cache", extra={"action": "cache_in_use"})
            return
        size = self._room()
        unclean = self._unclean()
        if self._data.exists() and (reason := self._suspect(size, unclean)):
            log.warning("recreated the chunk cache: %s", reason, extra={"action": "cache_lost"})
            self._delete(reason)
            size, unclean = self._room(), 0
        if size < _LEAST:
            log.warning("too little free disk space for a chunk cache", extra={"action": "cache_no_room"})
            return
        self._state.write_text(f"open {unclean + 1}")
        self._db = LmdbChunks(self._folder, size)
        self._owner = os.getpid()
        self._map_size = size
        rows = self._db.rows()
        self._sizes = OrderedDict((digest, size) for digest, size, _ in rows)
        self._clock = rows[-1][2] if rows else 0
        self._capacity = int(size * _FILLED)
        self._count(sum(self._sizes.values()) - self._bytes)

    def _unmap(self, size: int) -> None:
        self._mapped += size
        if self._mapped > _MAPPED and self._db is not None:
            self._mapped = 0
            self._db.close()
            try:
                self._db = LmdbChunks(self._folder, self._map_size)
            except (Full, Damaged) as error:
                self._db = None
                self._lost("damaged", error)

    def _fingerprint(self) -> tuple[int, ...]:
        found = self._data.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _locked(self) -> bool:
        """Return True if this process now owns the folder."""
        if self._lock_file is not None:
            return True
        descriptor = os.open(self._folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock_file = descriptor
        return True

    def _room(self) -> int:
        """Return the maximum size of the file in bytes, in whole pages."""
        used = self._data.stat().st_blocks * 512 if self._data.exists() else 0
        free = shutil.disk_usage(self._folder).free + used - self._reserve
        return max(0, min(self._budget, free)) // mmap.PAGESIZE * mmap.PAGESIZE

    def _suspect(self, size: int, unclean: int) -> str:
        """Return one word on why an existing file must be deleted; empty if it may stay.

        A child process checks the file, unless it is unchanged since this process closed it. After a clean
        shutdown only its structure is checked.
        """
        looks = self._fingerprint()
        if looks[1] > size:
            return "too_large"
        if unclean >= _UNCLEAN:
            return "suspected"
        if not unclean and looks == self._left:
            return ""
        how = "whole" if unclean else "quick"
        program = [sys.executable, "-I", lmdb_chunks.__file__, str(self._folder), str(size), how]
        try:
            done = subprocess.run(program, capture_output=True, timeout=_TRY_S, check=False)
        except subprocess.TimeoutExpired:
            return "slow"
        return "" if done.returncode == 0 else "damaged"

    def _unclean(self) -> int:
        """Return the number of unclean shutdowns in a row; a file changed since its last close counts as one."""
        try:
            how, _, rest = self._state.read_text().partition(" ")
            if how == "closed":
                return int(rest != str(self._fingerprint()))
            return int(rest)
        except (OSError, ValueError):
            return int(self._data.exists())

    def _close_db(self) -> None:
        if self._db is not None and self._owner == os.getpid():
            self._db.close()
        self._db = None
        self._sizes.clear()
        self._touched.clear()
        self._count(-self._bytes)

    def _delete(self, reason: str) -> None:
        """Delete the file; only its owner may."""
        if self._lock_file is None:
            return
        metrics.CHUNK_CACHE_LOST.labels(reason).inc()
        for path in (self._data, self._folder / "lock.mdb", self._state):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    @property
    def _data(self) -> Path:
        return self._folder / DATA

    @property
    def _state(self) -> Path:
        """Return the path of the state file: ``closed`` and the file's stat, or ``open`` and a count."""
        return self._folder / "state"
