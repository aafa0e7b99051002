"""Sets how many messages a busy worker pulls, from learned run times and pending jobs. Pure.

Another idle worker could begin a message that a busy worker holds. So a worker prefetches only messages that
it expects to begin within :data:`AHEAD_S`, which keeps an instance of a fast model busy; otherwise it pulls
only for a free instance.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

AHEAD_S = 0.025
"""Expected wait in seconds up to which a worker prefetches a message."""

_REMEMBERED = 15
"""Recent runs to take the median from, so that one run that is a thousand times slower changes nothing."""


class PullPace:
    """Learned run times of a version and jobs per message."""

    def __init__(self) -> None:
        self._runs: deque[float] = deque(maxlen=_REMEMBERED)
        self._shares: deque[float] = deque(maxlen=_REMEMBERED)
        self._sizes: deque[int] = deque(maxlen=_REMEMBERED)
        self._run_s = self._job_s = math.inf
        self._jobs = 1.0

    @property
    def job_s(self) -> float:
        """Return the usual seconds of a job; 0: none has run yet."""
        return 0.0 if math.isinf(self._job_s) else self._job_s

    def record_run(self, seconds: float, jobs: float) -> None:
        """Record the time of a run of so many jobs, or such a fraction of one."""
        self._runs.append(seconds)
        self._shares.append(seconds / max(jobs, 1e-6))
        self._run_s, self._job_s = median(self._runs), median(self._shares)

    def record_message(self, jobs: int) -> None:
        """Record the jobs of a message."""
        self._sizes.append(jobs)
        self._jobs = max(1.0, median(self._sizes))

    def pull_target(self, *, running: int, copies: int, waiting: int, most: int) -> int:
        """Return how many messages a lane may have pending, at most ``most``.

        ``running`` of the ``copies`` instances are busy, and ``waiting`` jobs run before the lane's next one.
        """
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
