"""How much a worker may ask for while it is busy: learned times of runs against what is in hand. Pure.

A message that a busy worker holds is one that another worker could begin now. So a worker asks ahead only for what it is
expected to begin within :data:`AHEAD_S`, which keeps a copy of a quick model busy, and otherwise only with a free copy.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

AHEAD_S = 0.025
"""How long a message may be expected to wait in a worker's hands."""

_REMEMBERED = 15
"""Runs from which the usual one is learned. The median: one request that takes a thousand times as long changes nothing."""


class PullPace:
    """What runs of a version take, and what a message brings."""

    def __init__(self) -> None:
        self._runs: deque[float] = deque(maxlen=_REMEMBERED)
        self._shares: deque[float] = deque(maxlen=_REMEMBERED)
        self._sizes: deque[int] = deque(maxlen=_REMEMBERED)
        self._run_s = self._job_s = math.inf
        self._jobs = 1.0

    @property
    def job_s(self) -> float:
        """Seconds that a job usually runs; 0: there was none yet."""
        return 0.0 if math.isinf(self._job_s) else self._job_s

    def ran(self, seconds: float, jobs: float) -> None:
        """A run of so many jobs, or of such a part of one, took so long."""
        self._runs.append(seconds)
        self._shares.append(seconds / max(jobs, 1e-6))
        self._run_s, self._job_s = median(self._runs), median(self._shares)

    def came(self, jobs: int) -> None:
        """A message brought so many jobs."""
        self._sizes.append(jobs)
        self._jobs = max(1.0, median(self._sizes))

    def wanted(self, *, running: int, copies: int, waiting: int, most: int) -> int:
        """Messages that a lane may have in hand and not begun, at most ``most``, while ``running`` of the ``copies`` run and
        ``waiting`` jobs in hand come before its next one."""
        free = copies - running
        if not waiting and free > 0:
            ahead_s, least = 0.0, free
        elif math.isinf(self._job_s):
            return 0
        else:
            ahead_s, least = (running * self._run_s + waiting * self._job_s) / copies, 0
        if ahead_s >= AHEAD_S:
            return 0
        more = (AHEAD_S - ahead_s) / max(self._jobs * self._job_s / copies, 1e-9)
        return max(least, min(most, 1 + int(more)))
