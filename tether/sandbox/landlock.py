"""Landlock: restricts the files of this process and its children. It needs no privilege and binds root too.

See ``linux/landlock.h`` and ``landlock(7)``. Each ABI version adds rights; a kernel does not restrict rights
it does not know, and :mod:`tether.sandbox.seccomp` refuses the important ones of these.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from tether.sandbox import kernel

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_SOCK, _MAKE_FIFO, _MAKE_SYM, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 9, 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 15

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
WRITE = READ | WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
"""No links: a cleanup must not follow one."""
SCRATCH = WRITE | _MAKE_SYM | _MAKE_FIFO | _MAKE_SOCK
DEVICE = READ_FILE | WRITE_FILE | _IOCTL_DEV
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEV

_KNOWN_RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
"""File rights by ABI version; later versions use the last entry."""
_TCP = 3
_SCOPED = 3
"""Scopes: abstract Unix sockets and signals."""
NET_ABI, SIGNALS_ABI, TRUNCATE_ABI = 4, 6, 3
_VERSION = 1
_PATH_BENEATH = 1

Rule = tuple[str, int]
"""A path, and the rights on it and below it."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


def abi() -> int:
    """Return the kernel's ABI version; 0 if it has none, or it was disabled at boot."""
    try:
        return kernel.call("landlock_create_ruleset", None, 0, _VERSION)
    except OSError:
        return 0


def restrict(rules: Iterable[Rule], version: int) -> None:
    """Restrict this thread, and all that it starts, to ``rules``; missing paths are skipped.

    Call it before the process has other threads, which would not be bound. From ABI 4 on no TCP port may be
    used; from 6 on no outside process can be signalled and no abstract socket of one reached. ``/proc``
    entries are resolved again when memory is scarce and would lose their rules, so its files stay open.

    Raises:
        OSError: the kernel refuses it.
    """
    known = _KNOWN_RIGHTS[min(version, len(_KNOWN_RIGHTS) - 1)]
    attributes = _Ruleset(known, _TCP if version >= NET_ABI else 0, _SCOPED if version >= SIGNALS_ABI else 0)
    size = 24 if version >= SIGNALS_ABI else 16 if version >= NET_ABI else 8
    ruleset = kernel.call("landlock_create_ruleset", ctypes.cast(ctypes.byref(attributes), ctypes.c_void_p), size, 0)
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & known)
        kernel.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _OF_FILES
    rule = _PathBeneath(rights, descriptor)
    try:
        kernel.call("landlock_add_rule", ruleset, _PATH_BENEATH, ctypes.cast(ctypes.byref(rule), ctypes.c_void_p), 0)
    finally:
        if not path.startswith("/proc/"):
            os.close(descriptor)
