"""Disk cache of graphs that ONNX Runtime optimised and code that PyTorch compiled, for faster reloads.

An entry belongs to one version's files, one framework release and one processor type. It ends with a digest
of these and of its content; an entry that does not match is deleted and rebuilt. Only the worker's own user
could forge an entry, and that user can replace the worker itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tether.model.config import COMPILED

log = logging.getLogger(__name__)

LARGEST = 16 << 20
"""Maximum bytes of a version's files to cache; above it verification is slower (measured, ADR 23)."""

_MARK = b"tethergraph1"
_END = len(_MARK) + hashlib.sha256().digest_size
_LARGEST_ENTRY = 16 * LARGEST
"""Maximum size of an entry: an optimised graph may include values computed from weights."""
_KEEPING = frozenset({"onnxruntime_onnx", *COMPILED})
"""Platforms whose processes cache something."""
_PROCESSES = "processes"
DRAFT = ".draft"
"""Suffix of files and folders whose writer may have been killed."""
_STALE_S = 3600.0


class GraphCache:
    """Cache entries below one folder, at most ``budget`` bytes; least recently used entries are evicted."""

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget

    def read(self, key: str) -> bytes | None:
        """Return the entry of a key; None if it is missing or cannot be trusted."""
        path = self._path(key)
        try:
            content = _trusted(path, key)
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.drop(key, f"cannot be read ({error.strerror})")
            return None
        if content is None:
            self.drop(key, "is damaged or does not belong here")
        return content

    def draft(self, size: int) -> Path | None:
        """Return a path to write a draft to; None without disk space for about twice ``size`` bytes."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > LARGEST or size > self._budget or shutil.disk_usage(self._folder).free < 2 * size:
                return None
            descriptor, name = tempfile.mkstemp(DRAFT, dir=self._folder)
        except OSError as error:
            log.warning("could not cache an optimised graph: %s", error.strerror, extra={"action": "graph_not_kept"})
            return None
        os.close(descriptor)
        return Path(name)

    def keep(self, key: str, draft: Path) -> None:
        """Turn a finished draft into an entry, evicting others if needed."""
        try:
            if draft.stat().st_size > _LARGEST_ENTRY - _END:
                return
            content = draft.read_bytes()
            with draft.open("ab") as file:
                file.write(_end(key, content))
            draft.rename(self._path(key))
            self._make_room()
        except OSError as error:
            log.warning("could not cache an optimised graph: %s", error.strerror, extra={"action": "graph_not_kept"})
        finally:
            draft.unlink(missing_ok=True)

    def drop(self, key: str, why: str) -> None:
        log.warning("deleted a cached graph that %s", why, extra={"action": "graph_dropped"})
        with suppress(OSError):
            _remove(self._path(key))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.graph"

    def _make_room(self) -> None:
        for path in self._folder.glob(f"*{DRAFT}"):
            with suppress(OSError):
                if path.lstat().st_mtime < time.time() - _STALE_S:
                    _remove(path)
        entries = []
        for path in self._folder.glob("*.graph"):
            with suppress(OSError):
                found = path.stat()
                entries.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._budget:
                return
            path.unlink(missing_ok=True)
            total -= size


def cache_beside(directory: Path, folder: str, megabytes: int) -> GraphCache | None:
    """Return the cache in ``folder`` for versions beside it; None for one whose files must not be on disk."""
    return GraphCache(Path(folder), megabytes << 20) if _beside(directory, folder) else None


def of_process(platform: str, directory: Path, folder: str) -> str:
    """Create and return the cache folder of one version's processes; empty if they cache nothing.

    ``directory`` has the version's files, and their digest as its name. Only processes of the same version
    read this folder.
    """
    if platform not in _KEEPING or not _beside(directory, folder):
        return ""
    own = Path(folder) / _PROCESSES / directory.name
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(own)
    except OSError as error:
        log.warning("could not cache an optimised graph: %s", error.strerror, extra={"action": "graph_not_kept"})
        return ""
    return str(own)


def trim(own: str, budget: int) -> None:
    """Delete cache folders of other versions, least recently used first, until ``budget`` bytes are left."""
    used = []
    for folder in Path(own).parent.iterdir():
        with suppress(OSError):
            size = sum(path.lstat().st_size for path in folder.rglob("*"))
            used.append((folder.stat().st_mtime_ns, size, folder))
    total = sum(size for _, size, _ in used)
    for _, size, folder in sorted(used):
        if total > budget and folder != Path(own):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _beside(directory: Path, folder: str) -> bool:
    return bool(folder) and directory.parent in Path(folder).parents


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def key_of(version: str, release: str, *what: str) -> str:
    """Return the cache key of version files (by digest), framework ``release``, machine and ``what``."""
    return hashlib.sha256("\0".join((version, release, _processor(), *what)).encode()).hexdigest()


def _processor() -> str:
    """Return the processor's instruction sets, which the layout of an optimised graph depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"


def _trusted(path: Path, key: str) -> bytes | None:
    """Return the verified content of a plain file that only this user may write; None otherwise."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if not own or not _END < found.st_size <= _LARGEST_ENTRY:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(found.st_size - _END)
            return content if file.read(_END + 1) == _end(key, content) else None
    finally:
        os.close(descriptor)


def _end(key: str, content: bytes) -> bytes:
    return _MARK + hashlib.sha256(key.encode() + content).digest()
