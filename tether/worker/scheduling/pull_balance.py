"""Sets how many pulls a worker keeps open on a version's lanes, as its share of the jobs. Pure.

The broker serves open pulls in turn. See docs/adr/0026-load-balancing.md.
"""

from __future__ import annotations

from typing import NamedTuple, assert_never

from tether.model.config import LoadBalancing

MOST = 8
"""Maximum pulls by capacity, relative to the least able worker: none starves, and a burst is spread."""

_LEARN_RUN = 0.1
"""Weight of the newest run in the average time of a job."""
_LEARN_BEAT = 0.3
"""Weight of the newest heartbeat in the average capacity."""
_STEADY = 0.75
"""Difference between capacity and open pulls from which the pulls are changed."""
_SCARCE_CPU = 0.5
_SCARCE_MEMORY = 0.2
"""Free fraction below which a worker pulls less, in proportion."""


class Headroom(NamedTuple):
    """Free fractions of a machine, 0 to 1: processors (including this worker's use), memory, GPU memory."""

    cpu: float
    memory: float
    gpu: float

    def factor(self, *, on_gpu: bool) -> float:
        """Return the fraction of its speed that a worker should get jobs for."""
        gpu = self.gpu / _SCARCE_MEMORY if on_gpu else 1.0
        return min(1.0, self.cpu / _SCARCE_CPU, self.memory / _SCARCE_MEMORY, gpu)


class Capacity:
    """Smoothed capacity of a worker for a version, and the open pulls that follow from it."""

    def __init__(self) -> None:
        self.level = 0.0
        """Jobs per second, reduced if the machine is short of a resource; 0: no job has run yet."""
        self.turns = 1
        self._job_s = 0.0

    def record_run(self, seconds: float, jobs: float) -> None:
        """Record the time of a run of so many jobs."""
        job_s = max(seconds / max(jobs, 1e-6), 1e-6)
        self._job_s += (job_s - self._job_s) * (_LEARN_RUN if self._job_s else 1.0)

    def update(self, factor: float, copies: int, least: float) -> None:
        """Update at each heartbeat.

        ``factor`` is the free fraction of the machine for ``copies`` concurrent runs; ``least`` is the level
        of the least able worker, 0 if unknown.
        """
        if not self._job_s:
            return
        level = max(copies * factor / self._job_s, 1e-6)
        self.level += (level - self.level) * (_LEARN_BEAT if self.level else 1.0)
        ratio = self.level / least if least > 0 else 1.0
        if abs(ratio - self.turns) > _STEADY:
            self.turns = round(min(float(MOST), max(1.0, ratio)))


def turns(strategy: LoadBalancing, weight: int, capacity: Capacity) -> int:
    """Return how many pulls to keep open; 0: one pull for all free slots."""
    match strategy:
        case LoadBalancing.LEAST_CONNECTIONS:
            return 0
        case LoadBalancing.ROUND_ROBIN:
            return 1
        case LoadBalancing.WEIGHTED_ROUND_ROBIN:
            return weight
        case LoadBalancing.CAPACITY:
            return capacity.turns
    assert_never(strategy)
