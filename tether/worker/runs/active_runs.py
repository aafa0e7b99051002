"""Tracks the active runs of one version, and ends them on timeout, deadline, withdrawal or unload."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager

from tether.process.clock import Clock
from tether.worker.models.run_limits import ActiveRun, Cause
from tether.worker.scheduling.job_turns import NextRun


class ActiveRuns:
    """Active runs and the jobs in them. ``withdrawn`` has the ids of jobs whose callers left."""

    def __init__(self, clock: Clock, withdrawn: Container[str]) -> None:
        self._clock = clock
        self._withdrawn = withdrawn
        self._jobs_of: dict[ActiveRun, NextRun] = {}

    @contextmanager
    def limited(self, turn: NextRun, run_timeout_s: float) -> Iterator[ActiveRun]:
        """Track one run while the block runs."""
        left = max(ticket.job.deadline for ticket in turn.tickets) - self._clock.utc()
        active_run = ActiveRun(run_timeout_s, left)
        self._jobs_of[active_run] = turn
        try:
            yield active_run
        finally:
            del self._jobs_of[active_run]

    def end_withdrawn(self) -> None:
        """End the runs whose jobs are all withdrawn; call it when ``withdrawn`` has grown."""
        for active_run, turn in self._jobs_of.items():
            if all(ticket.job.id in self._withdrawn for ticket in turn.tickets):
                active_run.end(Cause.UNWANTED)

    def end_all(self) -> None:
        """End all runs because the version is unloaded."""
        for active_run in self._jobs_of:
            active_run.end(Cause.UNLOAD)
