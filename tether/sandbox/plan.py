"""Describes what a model's process may do; the service that starts it builds the plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec

import tether
from tether.errors import ConfigError, ModelRejected
from tether.sandbox import landlock, seccomp

REQUIRED, AVAILABLE, OFF = "required", "available", "off"
"""Values of the setting ``model_confinement``."""
WITHOUT_CODE = frozenset({"onnxruntime_onnx", "pytorch_safetensors"})
"""Platforms whose models are data; models of all others are or may contain programs."""
PROGRAM = "tether.sandbox.enter"

_SYSTEM = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local/lib64", "/usr/local/cuda",
    "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime",
    "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm/transparent_hugepage",
    "/dev/random", "/dev/urandom",
)  # fmt: skip
"""Paths that frameworks and the C library read."""
_PROC = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/sys/vm")
"""Likewise; ``/proc/self`` is the process's own."""
_PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
_GPU = ("/sys/devices", "/sys/bus/pci", "/sys/module/nvidia", "/proc/driver/nvidia", "/proc/devices", "/proc/modules")
_COMPILER = ("/usr/libexec", "/usr/include", "/usr/local/include")


class ConfinementPlan(msgspec.Struct, frozen=True):
    """What one process may do. ``rules``: paths and Landlock rights; ``parent``: it ends with that.

    It may write ``scratch_mb`` MiB of its own files in memory, none larger than ``file_mb`` (0: unlimited),
    and starts other processes only with ``processes``.
    """

    mode: str
    parent: int
    rules: tuple[tuple[str, int], ...]
    scratch_mb: int = 0
    file_mb: int = 0
    processes: bool = False
    dies_first: bool = False
    """Whether the kernel kills it before others when memory is short."""
    behind: bool = False
    """Whether it has low priority."""


class ConfinementRequest(msgspec.Struct, frozen=True):
    """What one process needs besides Python and its libraries; ``mode`` is the setting ``model_confinement``.

    ``apart`` is the data directory, of which it gets only what is listed here.
    """

    mode: str = REQUIRED
    apart: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    compilers: tuple[str, ...] = ()
    """Folders with programs that it may start; none if empty."""
    gpu: bool = False
    scratch_mb: int = 0
    file_mb: int = 0
    dies_first: bool = False
    behind: bool = False


@cache
def offered() -> tuple[int, bool]:
    """Return the kernel's Landlock ABI (0: none), and whether it has seccomp."""
    return landlock.abi(), seccomp.available()


def missing() -> str:
    """Return what this kernel lacks to confine a process; empty if nothing."""
    abi, filters = offered()
    return " and ".join(name for name, there in (("Landlock", abi > 0), ("seccomp", filters)) if not there)


def check(mode: str, platform: str) -> None:
    """Refuse a model that is a program and could not be confined.

    Raises:
        ModelRejected: the kernel cannot confine it, and the setting requires that.
    """
    if mode != REQUIRED or platform in WITHOUT_CODE:
        return
    if lacking := missing():
        raise ModelRejected(
            f"models for '{platform}' are programs, and this machine's kernel cannot confine them: it has no {lacking} "
            "(Linux 5.13 or newer, not disabled at boot); set 'model_confinement' to 'available' to run them "
            "with what it has",
            field="platform",
        )


def mode_for(mode: str, platform: str) -> str:
    """Return a platform's mode: models that are data run with what the kernel has, always."""
    return AVAILABLE if mode == REQUIRED and platform in WITHOUT_CODE else mode


def plan(wish: ConfinementRequest) -> ConfinementPlan:
    """Return the plan of one process.

    Raises:
        ModelRejected: Python's own folder contains the data directory, so that they cannot be separated.
    """
    try:
        shared = [*_libraries(wish.apart), *_SYSTEM]
    except ConfigError as error:
        raise ModelRejected(error.message) from error
    rules = [(path, landlock.READ) for path in (*shared, *_PROC, *wish.read)]
    rules += [(path, landlock.DEVICE) for path in _PLAIN_DEVICES]
    if wish.gpu:
        rules += [(path, landlock.READ) for path in _GPU]
        rules += [(str(path), landlock.DEVICE | landlock.READ_DIR) for path in Path("/dev").glob("nvidia*")]
    if wish.compilers:
        # a compiler runs programs beside libraries, and PyTorch runs Python to check compiled code
        python = str(Path(sys.executable).resolve())
        rules += [(path, landlock.RUN) for path in (*wish.compilers, *_COMPILER, python, *shared)]
    rules += [(path, landlock.WRITE) for path in wish.write]
    return ConfinementPlan(
        mode=wish.mode,
        parent=os.getpid(),
        rules=tuple(rules),
        scratch_mb=wish.scratch_mb,
        file_mb=wish.file_mb,
        processes=bool(wish.compilers),
        dies_first=wish.dies_first,
        behind=wish.behind,
    )


def command(made: ConfinementPlan, module: str, *arguments: str) -> list[str]:
    """Return the command line that runs one of our modules in a process that confines itself first."""
    return [sys.executable, "-s", "-m", PROGRAM, msgspec.json.encode(made).decode(), module, *arguments]


def environment() -> dict[str, str]:
    """Return the environment of such a process: nothing of its parent's."""
    return {
        "PYTHONPATH": os.pathsep.join(import_paths()),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "USER": "model",
        "HOME": "/nonexistent",  # not the user database's, which frameworks would search and may not read
        "TORCHINDUCTOR_CACHE_DIR": "/",  # PyTorch creates this folder on import, and could create no other
        "LANG": "C.UTF-8",
        "ORT_DISABLE_TELEMETRY": os.environ.get("ORT_DISABLE_TELEMETRY", "1"),
    }


def import_paths() -> list[str]:
    """Return this process's module search path without the current folder, which no one configured."""
    here = str(Path.cwd())
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in sys.path if entry and (entry != here or entry in named)]


def hidden_paths(apart: str) -> list[str]:
    """Return module folders that models' processes do not get, because the data directory is inside."""
    return [entry for entry in import_paths() if _holds(entry, apart)]


def read_dirs(setting: str) -> tuple[str, ...]:
    """Return the paths of the setting ``model_read_dirs``."""
    return tuple(entry.strip() for entry in setting.split(",") if entry.strip())


def _libraries(apart: str) -> Sequence[str]:
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    own = [
        str(Path(prefix) / folder)
        for prefix in sorted(prefixes)
        for folder in ("lib", "lib64", "include", "pyvenv.cfg")
    ]
    own.append(str(Path(tether.__file__).parent))
    for path in own:
        if _holds(path, apart):
            raise ConfigError(
                f"the data directory {apart} is inside Python's folder {path}, which models may read; move it"
            )
    return [*own, *_outermost(own, (entry for entry in import_paths() if not _holds(entry, apart)))]


def _outermost(own: Sequence[str], entries: Iterable[str]) -> list[str]:
    return [entry for entry in entries if not any(Path(entry).is_relative_to(path) for path in own)]


def _holds(folder: str, apart: str) -> bool:
    """Return True if the data directory is a folder or inside it."""
    return bool(apart) and Path(apart).resolve().is_relative_to(Path(folder).resolve())
