"""A verified delivery that a worker processes, and the progress of its jobs."""

from __future__ import annotations

from tether.crypto import Header
from tether.domain.job import Job, LaneKind
from tether.streams.lane_consumer import Delivery


class Bundle:
    """Header and jobs of a delivery, the right to settle it, and its progress."""

    __slots__ = (
        "begun",
        "delivery",
        "header",
        "jobs",
        "last_active_at",
        "leaving",
        "noted",
        "running",
        "suspect",
        "unfinished",
    )

    def __init__(self, delivery: Delivery, header: Header, jobs: list[Job]) -> None:
        self.delivery = delivery
        self.header = header
        self.jobs = jobs
        self.unfinished = len(jobs)
        """Jobs that have not finished."""
        self.running = 0
        self.begun = False
        self.noted = False
        """Whether a note that it began is stored."""
        self.leaving = False
        """Whether it is handed back as soon as none of its jobs runs."""
        self.suspect = False
        """Whether one of its jobs may have killed the worker that had it before."""
        self.last_active_at = 0.0
        """When it arrived, or one of its jobs last began or finished; monotonic seconds."""

    @property
    def durable(self) -> bool:
        return self.delivery.lane.kind is LaneKind.JOB
