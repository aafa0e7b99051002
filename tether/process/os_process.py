"""Small truths about operating-system processes that several parts need."""

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
    """What a child runs between fork and exec so that it gets ``number`` when its parent is gone; None off Linux.

    The library is loaded before the fork, because a forked child of a threaded process must not import.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before the bond was made
            os._exit(1)

    return bind


def keep_memory_private() -> bool:
    """Let no other process of the same user read this one's memory and environment, or trace it; root still can.

    Programs that this process starts are as open as ever. False where the system has no such thing.
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAPS = 2
"""Heaps of a service's process. One for each thread, as glibc has it, keeps what each of them once used."""
KEEP_MB = 64
"""What is worth keeping of them where chunks of models pass through."""
_BLOCK = 32 << 20
"""Smaller blocks come from a heap. That is what glibc itself comes to once blocks of that size were given back."""


def limit_malloc_arenas(keep_mb: int = 0) -> None:
    """Let the threads of this process share its heaps; without effect where the C library is not glibc.

    ``keep_mb``: what is given back to a heap's end stays up to this size. Who moves large blocks all the time would otherwise take
    and give back the same pages for each of them.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, HEAPS)
        if keep_mb:
            mallopt(_M_MMAP_THRESHOLD, _BLOCK)
            mallopt(_M_TRIM_THRESHOLD, keep_mb << 20)


NICE = 10
"""How far work goes after others, as the kernel measures it from 1 to 19: it gets a ninth of a processor that others want too."""
LONG_S = 0.05
"""Seconds of a processor from which on a run of a model is long, and goes after others."""


def goes_after_others(pid: int) -> None:
    """Let other processes have the processors before this one or one of its children.

    Where the kernel groups the processes of a session, it divides the processors between sessions, whatever priorities the processes
    have. So if the process began a session, that goes after others too.
    """
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            thread_goes_after_others(int(thread.name))
    with suppress(OSError):
        if os.getsid(pid) == pid:
            Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


def processor_s(pid: int) -> float:
    """Seconds of a processor that a process has taken so far, all of its threads together; 0 when it is gone, and off Linux."""
    if sys.platform != "linux":
        return 0.0
    try:
        return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)
    except OSError:
        return 0.0


def thread_goes_after_others(thread: int) -> None:
    """Let other threads have the processors before one, by its native id. Only Linux has priorities of threads. Without privileges
    a thread never comes back from it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, NICE)


def prefer_oom_kill() -> None:
    """When the machine is out of memory, this process is ended before others: raising one's own score needs no right."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class _SignalStack(ctypes.Structure):
    """``stack_t`` of the C library."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_SIGNAL_STACK = 64 << 10
_own = threading.local()


def signal_stack() -> None:
    """Give this thread a stack for signal handlers, so that one can say so when its own stack is full.

    Python gives one to the thread that turns ``faulthandler`` on, and to no other.
    """
    with suppress(AttributeError, OSError):
        sigaltstack = ctypes.CDLL(None, use_errno=True).sigaltstack
        _own.buffer = ctypes.create_string_buffer(_SIGNAL_STACK)
        sigaltstack(ctypes.byref(_SignalStack(ctypes.addressof(_own.buffer), 0, _SIGNAL_STACK)), None)


def out_of_memory_kills() -> int:
    """How many processes of this machine the kernel has ended for want of memory; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def locked(descriptor: int) -> int | None:
    """The descriptor, with the lock on its file until it is closed; None, and it is closed, when another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def alive(pid: int) -> bool:
    """Whether a process exists and is more than an exit status nobody has read; 0 is nobody's number."""
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
    """Signal a process that may be gone already; never a group of them."""
    if pid <= 0:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def can_listen(host: str, port: int) -> bool:
    """Whether this process could listen on a TCP port just now; port 0 is always free."""
    return not why_not_listen(host, port)


def why_not_listen(host: str, port: int) -> str:
    """Why this process could not listen on a TCP port just now, as the system says it; empty when it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
