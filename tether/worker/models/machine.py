"""Reads the free capacity of the worker's machine from the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tether.worker.models.gpu import Gpus
from tether.worker.scheduling.pull_balance import Headroom

_LEAST_TICKS = 10
"""Fewest ticks of all processors for a meaningful measurement."""
_IDLE, _TOTAL = slice(3, 5), slice(0, 8)
"""Columns of ``/proc/stat``: idle and iowait; all but guests, which user time includes."""


class Machine:
    """Measures processors, memory and GPUs; unknown values count as free. Blocks for about 1 ms."""

    def __init__(self, root: Path = Path("/"), gpus: Gpus | None = None) -> None:
        self._proc = root / "proc"
        self._cgroup = root / "sys/fs/cgroup"
        self._gpus = gpus
        self._before = (0, 0, 0)
        self._cpu = 1.0

    def measure(self) -> Headroom:
        """Return what is free now; for processors, since the last call."""
        if self._gpus is None:
            self._gpus = Gpus()
        return Headroom(self._processors(), self._memory(), self._gpus.free())

    def _processors(self) -> float:
        """Return the fraction of processor time that was idle, or used by this process and its children."""
        try:
            columns = [int(text) for text in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:]]
            own = sum(self._ticks(pid) for pid in (os.getpid(), *self._children(os.getpid())))
        except (OSError, ValueError):
            return self._cpu
        now = sum(columns[_TOTAL]), sum(columns[_IDLE]), own
        total, idle, mine = (new - old for new, old in zip(now, self._before, strict=True))
        if total >= _LEAST_TICKS:
            # the first measurement would cover the time since boot
            self._cpu = min(1.0, max(0.0, (idle + mine) / total)) if self._before[0] else 1.0
            self._before = now
        return self._cpu

    def _ticks(self, pid: int) -> int:
        """Return processor ticks of a process and its finished children; 0 if it does not exist."""
        try:
            # the name before the last parenthesis may contain spaces
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return sum(int(field) for field in fields[11:15])

    def _children(self, pid: int) -> Iterator[int]:
        for path in (self._proc / str(pid) / "task").glob("*/children"):
            try:
                found = [int(text) for text in path.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            for child in found:
                yield child
                yield from self._children(child)

    def _memory(self) -> float:
        """Return the free fraction of the machine's or this control group's memory, the smaller one."""
        return min(self._whole(), self._group())

    def _whole(self) -> float:
        try:
            rows = dict(line.split(":", 1) for line in (self._proc / "meminfo").read_text().splitlines())
            return int(rows["MemAvailable"].split()[0]) / int(rows["MemTotal"].split()[0])
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            return 1.0

    def _group(self) -> float:
        """Return the free fraction of the control group's memory; inactive file pages count as free."""
        try:
            path = (self._proc / "self/cgroup").read_text().split("::", 1)[1].split("\n", 1)[0]
            group = self._cgroup / path.lstrip("/")
            limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
            rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return min(1.0, max(0.0, (limit - used + int(rows.get("inactive_file", 0))) / limit))
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # "max" means no limit
            return 1.0
