"""Records the versions that run in the worker's own process, so that a crash is attributed to one.

A worker has two files. ``NAME.running`` has a line for each active run and load, in memory that outlives the
process. Python's ``faulthandler`` writes ``NAME.crash`` if a signal such as SIGSEGV, SIGFPE or SIGABRT ends
the process. A killed process leaves lines but no crash; then only the kernel's count of out-of-memory kills
is evidence: no version is suspected because an operator killed its worker.
"""

from __future__ import annotations

import faulthandler
import logging
import mmap
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from tether.domain.manifest import ModelRef
from tether.process import metrics
from tether.process.data_dir import private_folder, write_secret
from tether.process.os_process import out_of_memory_kills

log = logging.getLogger(__name__)

_LINE = 128
"""Bytes of a line: a thread id, a model name of 64 characters and a version."""
_LINES = 512
_CURRENT = re.compile(r"Current thread 0x([0-9a-f]+)")
_FATAL = re.compile(r"Fatal Python error: ([^\n]{1,100})")


class CrashNotes:
    """Versions whose run or load ever ended this worker's process, with the cause, in ``crashed``.

    Without disk space nothing is recorded, and nothing is known later.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self._worker = worker
        self._running = folder / f"{worker}.running"
        self._crash = folder / f"{worker}.crash"
        self._known = folder / f"{worker}.crashed.json"
        self._lock = threading.Lock()
        self._free = list(range(1, _LINES))
        self._file: int | None = None
        private_folder(folder)
        self.crashed = self._remembered() | self._new()
        self._map = self._begun()

    def watch(self) -> None:
        """Record the signal that ends this process. Call once, and only in this worker's own process."""
        with suppress(OSError):
            self._file = os.open(self._crash, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            faulthandler.enable(self._file)

    def close(self) -> None:
        """Delete the records: nothing runs any longer."""
        if self._file is not None:
            faulthandler.disable()
            os.close(self._file)
        if self._map is not None:
            self._map.close()
            self._map = None
        for path in (self._running, self._crash):
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def running(self, ref: ModelRef) -> Iterator[None]:
        """Record that this thread loads or runs a version until the block ends. No locks, no system calls."""
        with self._lock:
            line = self._free.pop() if self._free and self._map is not None else 0
        if not line or self._map is None:
            yield
            return
        start = line * _LINE
        text = f"{threading.get_ident():x} {ref.model}:{ref.version}\n".encode()
        self._map[start : start + len(text)] = text
        try:
            yield
        finally:
            if self._map is not None:
                self._map[start] = 0
            with self._lock:
                self._free.append(line)

    def beat(self) -> None:
        """Record the kernel's count of out-of-memory kills, at each heartbeat."""
        if self._map is not None:
            text = f"{out_of_memory_kills()}\n".encode()
            self._map[: len(text)] = text

    def _remembered(self) -> dict[ModelRef, str]:
        try:
            return _refs(msgspec.json.decode(self._known.read_bytes(), type=dict[str, str]))
        except (OSError, msgspec.DecodeError):
            return {}

    def _new(self) -> dict[ModelRef, str]:
        """Return the version that ended the last process, if any, and remember it."""
        lines, kills = _read_lines(self._running)
        how = ""
        with suppress(OSError):
            text = self._crash.read_text(errors="replace")
            if fatal := _FATAL.search(text):
                how = fatal[1]
                current = _CURRENT.search(text)
                own = {label for thread, label in lines if current and int(thread, 16) == int(current[1], 16)}
                lines = [(thread, label) for thread, label in lines if label in own or not own]
        if not how and lines and out_of_memory_kills() > kills >= 0:
            how = "out of memory"
        if not how:
            return {}
        reason = f"a run of the model ended worker '{self._worker}': {how}"
        found = _refs({label: reason for _, label in lines})
        for ref in found:
            metrics.WORKER_CRASHES.labels(ref.model).inc()
            fields = {"action": "worker_crashed", "model": ref.model, "version": ref.version, "worker": self._worker}
            log.error("moved %s:%d to its own process: %s", ref.model, ref.version, reason, extra=fields)
        if not found:
            log.error("the worker's last process ended: %s; no model ran", how, extra={"action": "worker_crashed"})
        known = {f"{ref.model}:{ref.version}": text for ref, text in (self._remembered() | found).items()}
        with suppress(OSError):
            write_secret(self._known, msgspec.json.encode(known))
        return found

    def _begun(self) -> mmap.mmap | None:
        """Create a file of empty lines with all blocks allocated, so that writes to the mapping cannot fail."""
        try:
            with self._running.open("wb+") as file:
                file.write(bytes(_LINE * _LINES))
                file.flush()
                os.fchmod(file.fileno(), 0o600)
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            log.warning(
                "could not create the crash record; crashes are not attributed to models: %s",
                error.strerror,
                extra={"action": "crash_notes_failed"},
            )
            return None


def _read_lines(path: Path) -> tuple[list[tuple[str, str]], int]:
    """Return threads and versions at the process's end, and its out-of-memory kill count (-1: none)."""
    try:
        content = path.read_bytes()
    except OSError:
        return [], -1
    found = []
    for start in range(0, len(content), _LINE):
        words = content[start : start + _LINE].partition(b"\n")[0].decode("ascii", "replace").split(" ")
        if start and len(words) == 2 and re.fullmatch(r"[0-9a-f]{1,16}", words[0]):
            found.append((words[0], words[1]))
    head = content[:_LINE].partition(b"\n")[0]
    return found, int(head) if head.isdigit() else -1


def _refs(labels: Mapping[str, str]) -> dict[ModelRef, str]:
    found = {}
    for label, reason in labels.items():
        model, _, version = label.rpartition(":")
        if model and version.isdecimal() and len(version) < 10:
            found[ModelRef(model, int(version))] = reason
    return found
