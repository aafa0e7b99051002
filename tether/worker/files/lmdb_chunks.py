"""Chunks in an LMDB file; the only importer of lmdb. Run as a program, it checks such a file.

LMDB trusts the file: a damaged one may kill the process that opens it. So a child process checks a file
before it is opened, and the hash of every chunk is compared before use.
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
"""Exit status of the program if the file is damaged."""

_ROW = struct.Struct(">QQ")
_TRIED = 8 << 20
"""Bytes of the value that is written and deleted to walk the list of free pages."""


class Damaged(Exception):
    """The file is damaged and cannot be used."""


class Full(Exception):
    """The file or the disk is full."""


class LmdbChunks:
    """One open file: chunks by digest; size and last use (an increasing number) in a second table.

    Reading a chunk's size from LMDB would read the chunk, so sizes are read from the second table.

    Open it once per process. ``folder`` has the file, which grows to at most ``size`` bytes. Writes are not
    synced: after a crash of the machine the file is checked before use.

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
        """Return digest, size and last use of each chunk, least recently used first."""
        with _errors(), self._env.begin() as txn:
            found = list(txn.cursor(self._used))
        if any(len(key) != 32 or len(row) != _ROW.size for key, row in found):
            raise Damaged("the table of chunks is damaged")
        rows = sorted((_ROW.unpack(row), key.hex()) for key, row in found)
        return [(digest, size, stamp) for (stamp, size), digest in rows]

    @property
    def is_short(self) -> bool:
        """Return True if the file is shorter than the pages in use; reading them would kill the process."""
        with _errors():
            pages = self._env.info()["last_pgno"] + 1
            return self._file.stat().st_size < pages * int(self._env.stat()["psize"])

    def get(self, digest: str) -> bytes | None:
        """Return the value of ``digest``, unchecked."""
        with _errors(), self._env.begin() as txn:
            found: bytes | None = txn.get(bytes.fromhex(digest), db=self._chunks)
            return found

    def put(self, chunks: Iterable[tuple[str, bytes]], rows: Iterable[tuple[str, int, int]]) -> None:
        """Store chunks, and size and last use of these and others, in one transaction."""
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
        """Read every chunk; return True if each matches its digest."""
        with _errors(), self._env.begin(buffers=True) as txn:
            return all(hashlib.sha256(chunk).digest() == key for key, chunk in txn.cursor(self._chunks))

    def try_writing(self) -> None:
        """Write a large chunk and delete it, so that LMDB walks its list of free pages."""
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
    """Check a file, in a process that it may kill."""
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
