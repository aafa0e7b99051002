"""A folder in memory, never on disk, for the plain text of encrypted models.

It is on tmpfs (or ramfs) and belongs to one process; the next process deletes what killed ones left. The
owner holds the lock on a file in it, so that processes that cannot see one another, as in two containers that
share ``/dev/shm``, do not delete each other's files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tether.errors import TmpfsUnavailable
from tether.process.os_process import locked

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_LOCK = ".lock"
_ESCAPED = re.compile(r"\\([0-7]{3})")


class MemoryFolder:
    """The folder of one identity of one home below ``base``, created on first use. All methods block."""

    def __init__(self, base: str, home: Path, identity: str) -> None:
        whose = hashlib.sha256(f"{home}\0{identity}".encode()).hexdigest()[:16]
        self._base = Path(base)
        self._own = self._base / f"tether-{os.geteuid()}-{whose}"
        self._lock: int | None = None
        self._path: Path | None = None

    def path(self) -> Path:
        """Return the folder, creating it if needed.

        Raises:
            TmpfsUnavailable: the base is not in memory, or other users could read it.
        """
        if self._path is None:
            if not in_memory(self._base):
                raise _refused("is not in memory; name one on tmpfs")
            try:
                self._path = self._made()
            except OSError as error:
                raise _refused(f"cannot be written ({error.strerror}); name another") from error
        return self._path

    def room(self, size: int) -> None:
        """Check that ``size`` more bytes fit.

        Raises:
            TmpfsUnavailable: they do not.
        """
        free = shutil.disk_usage(self.path()).free
        if free < size:
            raise _refused(f"has {free} bytes free and the model needs {size}; make it larger")

    def sweep(self) -> None:
        """Delete what killed processes left, if there is such a place."""
        with suppress(OSError, TmpfsUnavailable):
            if self._own.is_dir() and in_memory(self._base):
                with self._alone():
                    self._remove_dead()

    def close(self) -> None:
        """Delete the folder with its content, and its parent if no other process has one there."""
        path, self._path = self._path, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if path is not None:
            self.sweep()

    def _made(self) -> Path:
        with self._alone():
            self._remove_dead()
            path = self._own / secrets.token_hex(8)
            path.mkdir(mode=0o700)
            self._lock = _locked(path / _LOCK)
        return path

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock creation and deletion of this identity's folders; delete an empty parent at the end."""
        descriptor = self._enter()
        try:
            yield
            with suppress(OSError):
                if [path.name for path in self._own.iterdir()] == [_LOCK]:
                    (self._own / _LOCK).unlink()
                    self._own.rmdir()
        finally:
            os.close(descriptor)

    def _enter(self) -> int:
        """Return the descriptor of the lock; retry if its file was deleted meanwhile."""
        while True:
            with suppress(FileNotFoundError):
                self._have_own()
                descriptor = os.open(self._own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if (self._own / _LOCK).stat().st_ino == os.fstat(descriptor).st_ino:
                        return descriptor
                os.close(descriptor)

    def _have_own(self) -> None:
        with suppress(FileExistsError):
            self._own.mkdir(mode=0o700)
        found = self._own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise _refused("has a folder of this user that others may enter; delete it")

    def _remove_dead(self) -> None:
        for path in self._own.iterdir():
            if path.is_dir() and path != self._path:
                with suppress(FileNotFoundError):  # its owner has just deleted it
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        lock = _locked(path / _LOCK)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _refused(what: str) -> TmpfsUnavailable:
    """Return the error without the path: it may be shown to the client that pushes."""
    return TmpfsUnavailable(
        f"an encrypted model needs a folder in memory, and setting 'decrypted_model_dir' names one that {what}",
        field="decrypted_model_dir",
        retry_after=30,
    )


def _locked(path: Path) -> int | None:
    """Lock a file and return its descriptor; None if another process has locked it."""
    return locked(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def in_memory(path: Path) -> bool:
    """Return True if a folder is on a file system without a disk; False if the kernel does not tell."""
    try:
        rows = _MOUNTS.read_text().splitlines()
        place = path.resolve(strict=True)
    except OSError:
        return False
    found, kind = Path(), ""
    for row in rows:
        # the last mount on a path is the visible one
        where, what = _mount(row)
        if place.is_relative_to(where) and len(where.parts) >= len(found.parts):
            found, kind = where, what
    return kind in _IN_MEMORY


def _mount(row: str) -> tuple[Path, str]:
    """Return mount point and file system type of a row of mountinfo."""
    left, _, right = row.partition(" - ")
    where = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), left.split()[4])
    return Path(where), right.split()[0]
