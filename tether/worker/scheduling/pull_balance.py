"""A worker's part of the jobs of a version: in how many places it waits for the next one. Pure.

A place is a request for one message; the broker serves waiting requests in turn. See docs/adr/0026-load-balancing.md.
"""

from __future__ import annotations

from typing import NamedTuple, assert_never

from tether.model.config import LoadBalancing

MOST = 8
"""Turns of a worker by its capacity, for each of the least able one: nobody starves, and a burst does not go to one alone."""

_LEARN_RUN = 0.1
"""Weight of the newest run in the time for a job."""
_LEARN_BEAT = 0.3
"""Weight of the newest heartbeat in the capacity."""
_STEADY = 0.75
"""How far the capacity must be from the number of turns before that is changed."""
_SCARCE_CPU = 0.5
_SCARCE_MEMORY = 0.2
"""With less than this part free a worker asks for less, in proportion."""


class Headroom(NamedTuple):
    """Parts of a machine, 0 to 1: processors that are idle or work for this worker, free memory, free memory of a GPU."""

    cpu: float
    memory: float
    gpu: float

    def factor(self, *, on_gpu: bool) -> float:
        """What part of its speed a worker should be given work for."""
        gpu = self.gpu / _SCARCE_MEMORY if on_gpu else 1.0
        return min(1.0, self.cpu / _SCARCE_CPU, self.memory / _SCARCE_MEMORY, gpu)


class Capacity:
    """What a worker can do of a version, smoothed; and the turns that follow from it."""

    def __init__(self) -> None:
        self.level = 0.0
        """Jobs a second, less where the machine is short of something; 0: there was no job yet."""
        self.turns = 1
        self._job_s = 0.0

    def ran(self, seconds: float, jobs: float) -> None:
        """A run of so many jobs took so long."""
        job_s = max(seconds / max(jobs, 1e-6), 1e-6)
        self._job_s += (job_s - self._job_s) * (_LEARN_RUN if self._job_s else 1.0)

    def look(self, factor: float, copies: int, least: float) -> None:
        """At each heartbeat: ``factor`` of the machine is there for ``copies`` runs side by side; ``least`` is the level of the
        least able worker, 0 when nobody knows."""
        if not self._job_s:
            return
        level = max(copies * factor / self._job_s, 1e-6)
        self.level += (level - self.level) * (_LEARN_BEAT if self.level else 1.0)
        ratio = self.level / least if least > 0 else 1.0
        if abs(ratio - self.turns) > _STEADY:
            self.turns = round(min(float(MOST), max(1.0, ratio)))


def turns(strategy: LoadBalancing, weight: int, capacity: Capacity) -> int:
    """How many requests for one message are to wait at a time; 0: one for as many as there are free slots."""
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
