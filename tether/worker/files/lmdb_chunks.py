"""Chunks in an LMDB file; the only importer of lmdb. Run as a program, it tries such a file out.

LMDB trusts what it reads: a damaged file may end the process that opens it. So nothing opens a file that a child process
has not gone through before, and nobody uses a chunk whose hash was not compared.
"""

from __future__ import annotations

import hashlib
import os
import resource
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

DATA = "data.mdb"
DAMAGED = 3
"""Exit status of the program: something in the file is not what it was."""

_ROW = struct.Struct(">QQ")
_TRIED = 8 << 20
"""Bytes of the value that is put and taken back, to go through the list of free pages."""


class Damaged(Exception):
    """The file cannot be used any more."""


class Full(Exception):
    """The file, or the disk, has no room."""


class LmdbChunks:
    """One open file: chunks by digest, and beside them the size of each and when it was used last, a number that grows.

    To come across a chunk in LMDB is to read it, so sizes are asked of the list beside them.

    It must be opened in the process that uses it, once. ``folder`` holds the file; it grows to ``size`` bytes at most.
    Nothing is synced: what a crash of the machine leaves is tried out before it is used.

    Raises:
        Damaged, Full: every method.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._file = folder / DATA
        with _errors():
            self._env = lmdb.open(
                str(folder), map_size=size, max_dbs=2, mode=0o600, writemap=False, sync=False, metasync=False,
                readahead=False, max_readers=16,
            )  # fmt: skip
            try:
                self._env.reader_check()
                self._chunks = self._env.open_db(b"pieces")
                self._used = self._env.open_db(b"used")
            except BaseException:
                self._env.close()
                raise

    def rows(self) -> list[tuple[str, int, int]]:
        """Digest, size and time of use of each chunk, that first which was not used for the longest time."""
        with _errors(), self._env.begin() as txn:
            found = list(txn.cursor(self._used))
        if any(len(key) != 32 or len(row) != _ROW.size for key, row in found):
            raise Damaged("the list of chunks is not one")
        rows = sorted((_ROW.unpack(row), key.hex()) for key, row in found)
        return [(digest, size, stamp) for (stamp, size), digest in rows]

    @property
    def is_short(self) -> bool:
        """Whether the file ends before pages that may be in use: to read one of those ends the process."""
        with _errors():
            pages = self._env.info()["last_pgno"] + 1
            return self._file.stat().st_size < pages * int(self._env.stat()["psize"])

    def get(self, digest: str) -> bytes | None:
        """What lies under ``digest``, whatever it is."""
        with _errors(), self._env.begin() as txn:
            found: bytes | None = txn.get(bytes.fromhex(digest), db=self._chunks)
            return found

    def put(self, chunks: Iterable[tuple[str, bytes]], rows: Iterable[tuple[str, int, int]]) -> None:
        """Store chunks, and size and time of use of these and others: all or none."""
        with _errors(), self._env.begin(write=True) as txn:
            for digest, chunk in chunks:
                txn.put(bytes.fromhex(digest), chunk, db=self._chunks)
            for digest, size, stamp in rows:
                txn.put(bytes.fromhex(digest), _ROW.pack(stamp, size), db=self._used)

    def delete(self, digests: Iterable[str]) -> None:
        with _errors(), self._env.begin(write=True) as txn:
            for digest in digests:
                txn.delete(bytes.fromhex(digest), db=self._chunks)
                txn.delete(bytes.fromhex(digest), db=self._used)

    def walk(self) -> bool:
        """Read all of every chunk; whether each is what its digest says."""
        with _errors(), self._env.begin(buffers=True) as txn:
            return all(hashlib.sha256(chunk).digest() == key for key, chunk in txn.cursor(self._chunks))

    def try_writing(self) -> None:
        """Put a large chunk and take it back: LMDB goes through its list of free pages."""
        with _errors(), self._env.begin(write=True) as txn:
            try:
                txn.put(b"\0" * 32, bytes(_TRIED), db=self._chunks)
            except lmdb.MapFullError:
                return
            finally:
                txn.abort()

    def close(self) -> None:
        self._env.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as error:
        raise Full(str(error)) from error
    except lmdb.Error as error:
        raise Damaged(str(error)) from error


def main(folder: str, size: str, whole: str) -> int:
    """Go through a file, in a process that may die of it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    database = LmdbChunks(Path(folder), int(size))
    database.rows()
    if (whole == "whole" or database.is_short) and not database.walk():
        return DAMAGED
    database.try_writing()
    database.close()
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:4]))
