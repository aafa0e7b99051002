"""Namespaces and privileges: an empty network, a private folder in memory, no capabilities.

Root may create namespaces; other users if the kernel permits it. Containers often forbid both.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Collection
from pathlib import Path

from tether.sandbox import kernel

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_PRIVATE = 0x4000 | 0x40000
"""MS_REC | MS_PRIVATE"""
_NO_DEVICES = 2 | 4
"""MS_NOSUID | MS_NODEV"""
_PLACES = ("/tmp", "/var/tmp", "/mnt", "/dev/shm")  # noqa: S108 - a private file system is mounted there
_FILES = 4096
THREADS = 1024
"""Threads of a process with its own user namespace; otherwise the kernel counts all processes of a user."""
_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38
_CAPABILITY_VERSION = 0x20080522
_READ_EVERY_FILE = 1 << 2
"""CAP_DAC_READ_SEARCH: root still reads files whose mode denies it; Landlock decides which files."""


def leave(scratch_mb: int, used: Collection[str]) -> str:
    """Leave the machine's network, mounts and shared memory; return a private folder in memory.

    It covers an existing folder that has none of the paths ``used``, and disappears with the process. Empty
    if the kernel permits none.
    """
    wanted = _NEW_NETWORK | _NEW_IPC | _NEW_MOUNTS
    if not _unshared(wanted):
        user, group = os.geteuid(), os.getegid()
        if not _unshared(_NEW_USER | wanted):
            _ = _unshared(_NEW_NETWORK) or _unshared(_NEW_USER | _NEW_NETWORK)
            return ""
        _count_threads()
        if not _named(user, group):
            return ""
    return _mounted(scratch_mb, used) if scratch_mb else ""


def give_up_privileges() -> None:
    """Drop all important capabilities, and gain none through any program.

    Raises:
        OSError: the kernel refuses it.
    """
    if not _capabilities(_READ_EVERY_FILE):
        _capabilities(0)
    kernel.control(_SET_NO_NEW_PRIVILEGES, 1)


def _unshared(flags: int) -> bool:
    try:
        return kernel.call("unshare", flags) == 0
    except OSError:
        return False


def _count_threads() -> None:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    limit = THREADS if most == resource.RLIM_INFINITY else min(THREADS, most)
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def _named(user: int, group: int) -> bool:
    """Map the same user and group into the new namespace; without a mapping no file can be created there."""
    try:
        kernel.control(_SET_DUMPABLE, 1)  # new privileges reset it, and without it the files below would belong to root
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return False
    return True


def _mounted(scratch_mb: int, used: Collection[str]) -> str:
    used = [str(Path(path).resolve()) for path in used]
    place = next((place for place in _PLACES if _is_free(Path(place), used)), "")
    if not place:
        return ""
    try:
        _mount("none", "/", "", _PRIVATE, "")
        _mount("tmpfs", place, "tmpfs", _NO_DEVICES, f"size={scratch_mb}m,nr_inodes={_FILES},mode=0700")
    except OSError:
        return ""
    return place


def _is_free(place: Path, used: Collection[str]) -> bool:
    if not place.is_dir():
        return False
    place = place.resolve()
    return not any(Path(path).is_relative_to(place) for path in used)


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    words = [ctypes.cast(ctypes.c_char_p(word.encode()), ctypes.c_void_p) for word in (source, target, kind, data)]
    kernel.call("mount", words[0], words[1], words[2], flags, words[3])


def _capabilities(kept: int) -> bool:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    try:
        kernel.call("capset", ctypes.cast(header, ctypes.c_void_p), ctypes.cast(data, ctypes.c_void_p))
    except OSError:
        return False
    return True
