"""seccomp: restricts the system calls of this process and its children. A filter can only be made narrower.

It refuses what Landlock does not cover: other processes (memory, limits, priorities), sockets, new processes,
namespaces, mounts, keys, kernel modules, modes and owners of files. Calls in another processor's ABI kill the
process. See ``linux/seccomp.h``, ``linux/filter.h`` and ``seccomp(2)``.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from tether.sandbox import kernel, landlock

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
"""Bit in the call numbers of x86-64's x32 ABI."""
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_SET_FILTER, _TO_ALL_THREADS = 1, 1
_ACTION_AVAILABLE = 2

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
"""All namespace flags."""
_TRUNCATING, _WAY = 0x200, 3
_TERMINAL_COMMANDS = (0x5412, 0x541C, 0x8901, 0x8902)
"""ioctls that insert terminal input, control the console, or (two) set the receiver of a file's signals."""
_SIGNALLING_COMMANDS = (8, 10, 15)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX."""
_PARENT_DEATH_SIGNAL = 1

_REFUSED = (
    # other processes
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp", "pidfd_getfd",
    "migrate_pages", "ioprio_set",
    # the machine
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "create_module", "swapon",
    "swapoff", "reboot", "sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt", "acct", "quotactl",
    "quotactl_fd", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "syslog", "vhangup", "nfsservctl",
    "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "personality", "lookup_dcookie",
    "uselib",
    # mounts and namespaces
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "open_tree_attr", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "unshare", "setns",
    # files, where Landlock does not check
    "open_by_handle_at", "name_to_handle_at", "fanotify_init", "fanotify_mark", "inotify_init", "inotify_init1",
    "inotify_add_watch", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat",
    "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr",
    "removexattrat", "file_setattr",
    # memory and messages shared by all processes of a user
    "shmget", "shmat", "shmctl", "msgget", "msgsnd", "msgrcv", "msgctl", "semget", "semop", "semtimedop", "semctl",
    "mq_open", "mq_unlink",
)  # fmt: skip
_ABSENT = ("io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_create", "memfd_secret", "openat2", "clone3")
"""Calls reported as not implemented, which programs cope with: they bypass rules or memory limits."""
_PROGRAMS = ("execve", "execveat")
_PROCESSES = ("fork", "vfork")
_OWN_PID_FIRST = ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")
"""Calls whose first argument is a process; 0 is the caller."""
_SIGNALS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_SIGNALS_REFUSED = ("tkill", "pidfd_send_signal")

_Program = list[tuple[int, int, int, int]]
"""Instructions: code, jump if true, jump if false, operand."""


def available() -> bool:
    """Return True if the kernel has seccomp and the processor is known."""
    action = ctypes.c_uint32(_KILL)
    try:
        pointer = ctypes.cast(ctypes.byref(action), ctypes.c_void_p)
        return bool(kernel.machine()) and kernel.call("seccomp", _ACTION_AVAILABLE, 0, pointer) == 0
    except OSError:
        return False


def install(program: _Program) -> None:
    """Apply a filter to every thread of this process. ``no_new_privs`` must be set.

    Raises:
        OSError: the kernel refuses it.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    kernel.call("seccomp", _SET_FILTER, _TO_ALL_THREADS, ctypes.cast(header, ctypes.c_void_p))


def models(pid: int, *, processes: bool, abi: int) -> _Program:
    """Return the filter of a model's process ``pid``; ``processes``: it may start others to compile.

    It refuses what Landlock of this ``abi`` does not restrict.
    """
    own = [_own_pid(0, pid)] if pid else []
    made = _head()
    made += _refused(_REFUSED + (() if processes else (*_PROCESSES, *_PROGRAMS)), errno.EPERM)
    made += _refused(_ABSENT, errno.ENOSYS) + _refused(("socket",), errno.EACCES)
    made += _when("socketpair", _only(0, (1,)))
    made += _when("clone", _no_bits(0, _CLONE_NEW) if processes else _needs_bit(0, _CLONE_THREAD))
    made += _when("prctl", _none_of(0, (_PARENT_DEATH_SIGNAL,)))
    made += _when("ioctl", _none_of(1, _TERMINAL_COMMANDS))
    made += _when("open", _truncates_only_what_it_writes(1)) + _when("openat", _truncates_only_what_it_writes(2))
    for name in _OWN_PID_FIRST:
        made += _when(name, *own)
    made += _when("setpriority", [*_load_argument(0), (_EQUAL, 1, 0, 0), _refuse(errno.EPERM), *_own_pid(1, pid)])
    if abi < landlock.TRUNCATE_ABI:
        made += _refused(("truncate",), errno.EPERM)
    if abi < landlock.SIGNALS_ABI:
        made += _refused(_SIGNALS_REFUSED, errno.EPERM) + _when("fcntl", _none_of(1, _SIGNALLING_COMMANDS))
        for name in _SIGNALS:
            made += _when(name, *own)
    return [*made, (_RETURN, 0, 0, _ALLOW)]


def no_more_processes() -> _Program:
    """Return the filter of a process that has started all that it needs."""
    threads = _when("clone", _needs_bit(0, _CLONE_THREAD))
    return [*_head(), *_refused((*_PROCESSES, *_PROGRAMS), errno.EPERM), *threads, (_RETURN, 0, 0, _ALLOW)]


def without(names: tuple[str, ...]) -> _Program:
    """Return a filter that reports these calls as not implemented."""
    return [*_head(), *_refused(names, errno.ENOSYS), (_RETURN, 0, 0, _ALLOW)]


def _head() -> _Program:
    """Return instructions that load the call's number."""
    made: _Program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[kernel.machine()]), _END]
    made.append((_LOAD, 0, 0, _NUMBER))
    if kernel.machine() == "x86_64":
        made += [(_ANY_BIT, 0, 1, _X32), _END]
    return made


_END = (_RETURN, 0, 0, _KILL)
_PASS = (_RETURN, 0, 0, _ALLOW)


def _refuse(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)


def _refused(names: tuple[str, ...], number: int) -> _Program:
    numbers = kernel.NUMBERS[kernel.machine()]
    made: _Program = []
    for name in names:
        if name in numbers:
            made += [(_EQUAL, 0, 1, numbers[name]), _refuse(number)]
    return made


def _when(name: str, *blocks: _Program) -> _Program:
    """Return instructions that decide about one call; each branch ends in a verdict."""
    number = kernel.NUMBERS[kernel.machine()].get(name)
    block = [step for steps in blocks for step in steps]
    return [(_EQUAL, 0, len(block), number), *block] if number is not None and block else []


def _load_argument(index: int) -> _Program:
    """Return an instruction that loads the lower half of an argument, which is all of an ``int``."""
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * index)]


def _only(index: int, values: tuple[int, ...]) -> _Program:
    steps = [step for value in values for step in [(_EQUAL, 0, 1, value), _PASS]]
    return [*_load_argument(index), *steps, _refuse(errno.EACCES)]


def _none_of(index: int, values: tuple[int, ...]) -> _Program:
    steps = [step for value in values for step in [(_EQUAL, 0, 1, value), _refuse(errno.EPERM)]]
    return [*_load_argument(index), *steps, _PASS]


def _own_pid(index: int, pid: int) -> _Program:
    return [*_load_argument(index), (_EQUAL, 0, 1, 0), _PASS, (_EQUAL, 0, 1, pid), _PASS, _refuse(errno.EPERM)]


def _needs_bit(index: int, bit: int) -> _Program:
    return [*_load_argument(index), (_ANY_BIT, 0, 1, bit), _PASS, _refuse(errno.EPERM)]


def _no_bits(index: int, bits: int) -> _Program:
    return [*_load_argument(index), (_ANY_BIT, 0, 1, bits), _refuse(errno.EPERM), _PASS]


def _truncates_only_what_it_writes(index: int) -> _Program:
    """Refuse to truncate a file opened for reading, a write that some kernels' Landlock permits."""
    return [
        *_load_argument(index),
        (_ANY_BIT, 1, 0, _TRUNCATING),
        _PASS,
        (_AND, 0, 0, _WAY),
        (_EQUAL, 0, 1, 0),
        _refuse(errno.EPERM),
        _PASS,
    ]
