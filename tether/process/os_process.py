"""Helpers for OS processes: signals, OOM score, priorities, file locks, ports."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return a function for a child to call between fork and exec; None off Linux.

    It makes the kernel send ``number`` to the child when its parent ends. The library is loaded before the
    fork, because a forked child of a threaded process must not import.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before prctl took effect
            os._exit(1)

    return bind


def keep_memory_private() -> bool:
    """Forbid the same user's other processes to trace this one or read its memory and environment.

    Programs that this process starts are not protected. Return False if the system has no such protection.
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAPS = 2
"""Malloc arenas of a service's process; glibc's one for each thread keeps every thread's peak memory."""
KEEP_MB = 64
"""Megabytes that arenas keep in processes that handle model chunks."""
_BLOCK = 32 << 20
"""Smaller blocks come from an arena. glibc adapts to the same once blocks of that size were freed."""


def limit_malloc_arenas(keep_mb: int = 0) -> None:
    """Share malloc arenas between the threads of this process; no effect without glibc.

    ``keep_mb``: free memory that an arena keeps at its end. Otherwise a process that moves large blocks
    allocates and returns the same pages for each block.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, HEAPS)
        if keep_mb:
            mallopt(_M_MMAP_THRESHOLD, _BLOCK)
            mallopt(_M_TRIM_THRESHOLD, keep_mb << 20)


NICE = 10
"""Nice value of low-priority work, 1 to 19: it gets a ninth of a processor that others want too."""
LONG_S = 0.05
"""CPU seconds after which a model's run counts as long and gets low priority."""


def lower_process_priority(pid: int) -> None:
    """Lower the priority of this process or of one of its children.

    If the kernel groups processes by session, it shares processors between sessions regardless of priorities;
    so a session that the process leads is lowered too.
    """
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            lower_thread_priority(int(thread.name))
    with suppress(OSError):
        if os.getsid(pid) == pid:
            Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


def processor_s(pid: int) -> float:
    """Return the CPU seconds of a process, all threads included; 0 if it does not exist, and off Linux."""
    if sys.platform != "linux":
        return 0.0
    try:
        return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)
    except OSError:
        return 0.0


def lower_thread_priority(thread: int) -> None:
    """Lower a thread's priority by its native id (Linux), for good without privileges."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, NICE)


def prefer_oom_kill() -> None:
    """Let the kernel kill this process first when memory is short; needs no privilege."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class _SignalStack(ctypes.Structure):
    """``stack_t`` of the C library."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_SIGNAL_STACK = 64 << 10
_own = threading.local()


def signal_stack() -> None:
    """Give this thread a stack for signal handlers, so that a stack overflow can be reported.

    Python gives one only to the thread that enables ``faulthandler``.
    """
    with suppress(AttributeError, OSError):
        sigaltstack = ctypes.CDLL(None, use_errno=True).sigaltstack
        _own.buffer = ctypes.create_string_buffer(_SIGNAL_STACK)
        sigaltstack(ctypes.byref(_SignalStack(ctypes.addressof(_own.buffer), 0, _SIGNAL_STACK)), None)


def out_of_memory_kills() -> int:
    """Return the kernel's count of out-of-memory kills on this machine; 0 if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def locked(descriptor: int) -> int | None:
    """Lock a file until its descriptor is closed; return None and close it if it is locked already."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def alive(pid: int) -> bool:
    """Return True if a process exists and is not a zombie; 0 is never alive."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except (OSError, IndexError):
        return False


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process, never a group; ignore one that does not exist."""
    if pid <= 0:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def can_listen(host: str, port: int) -> bool:
    """Return True if this process could listen on a TCP port now; port 0 is always free."""
    return not why_not_listen(host, port)


def why_not_listen(host: str, port: int) -> str:
    """Return the system's reason why this process cannot listen on a TCP port; empty if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
