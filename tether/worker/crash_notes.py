"""Which versions run in the worker's own process, written down while they do, so that the next process knows of which one
the last process died.

Two files of a worker: in ``NAME.running`` each run and load has a line while it goes on, in memory that outlives the process; into
``NAME.crash`` Python's ``faulthandler`` writes when a signal such as SIGSEGV, SIGFPE or SIGABRT ends the process. A process that was
killed leaves lines and no crash, and then only the kernel's count of processes that it ended for want of memory speaks against
them: nobody suspects a version because an operator killed its worker.
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
"""Bytes of one line: a thread's number, a model's name of 64 characters and a version."""
_LINES = 512
_CURRENT = re.compile(r"Current thread 0x([0-9a-f]+)")
_FATAL = re.compile(r"Fatal Python error: ([^\n]{1,100})")


class CrashNotes:
    """``crashed`` has the versions of which a run or a load ended this worker's process, ever, and how.

    Without room on the disk nothing is written down, and nothing is known later.
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
        """From here on the signal that ends this process is written down. Once in a process, and only if it is this worker's own."""
        with suppress(OSError):
            self._file = os.open(self._crash, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            faulthandler.enable(self._file)

    def close(self) -> None:
        """Nothing runs any more."""
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
        """A version is loaded or run by this thread until the block ends. Blocks nobody and makes no system call."""
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
        """Note how many processes the kernel has ended so far, at each heartbeat."""
        if self._map is not None:
            text = f"{out_of_memory_kills()}\n".encode()
            self._map[: len(text)] = text

    def _remembered(self) -> dict[ModelRef, str]:
        try:
            return _refs(msgspec.json.decode(self._known.read_bytes(), type=dict[str, str]))
        except (OSError, msgspec.DecodeError):
            return {}

    def _new(self) -> dict[ModelRef, str]:
        """What the last process died of, if it was of a version; then it is remembered."""
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
        reason = f"a run of it ended worker '{self._worker}': {how}"
        found = _refs({label: reason for _, label in lines})
        for ref in found:
            metrics.WORKER_CRASHES.labels(ref.model).inc()
            fields = {"action": "worker_crashed", "model": ref.model, "version": ref.version, "worker": self._worker}
            log.error(
                "%s:%d runs in a process of its own from now on: %s", ref.model, ref.version, reason, extra=fields
            )
        if not found:
            log.error("this worker's process ended: %s; no model ran", how, extra={"action": "worker_crashed"})
        known = {f"{ref.model}:{ref.version}": text for ref, text in (self._remembered() | found).items()}
        with suppress(OSError):
            write_secret(self._known, msgspec.json.encode(known))
        return found

    def _begun(self) -> mmap.mmap | None:
        """A file of empty lines, all of whose bytes are on the disk already: touching them can end nobody."""
        try:
            with self._running.open("wb+") as file:
                file.write(bytes(_LINE * _LINES))
                file.flush()
                os.fchmod(file.fileno(), 0o600)
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            log.warning("crashes are not told apart: %s", error.strerror, extra={"action": "crash_notes_failed"})
            return None


def _read_lines(path: Path) -> tuple[list[tuple[str, str]], int]:
    """Threads and versions that ran when the process ended, and the count of processes that the kernel had ended; -1: none."""
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
