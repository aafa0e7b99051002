"""A verified delivery that a worker has in hand, and how far its jobs have come."""

from __future__ import annotations

from tether.crypto import Header
from tether.domain.job import Job, LaneKind
from tether.streams.lane_consumer import Delivery


class Bundle:
    """The header of a delivery, its jobs, the right to settle it, and how far its jobs have come."""

    __slots__ = ("begun", "delivery", "header", "jobs", "leaving", "left", "noted", "running", "suspect", "touched_at")

    def __init__(self, delivery: Delivery, header: Header, jobs: list[Job]) -> None:
        self.delivery = delivery
        self.header = header
        self.jobs = jobs
        self.left = len(jobs)
        """Jobs that have not ended."""
        self.running = 0
        self.begun = False
        self.noted = False
        """Whether a note says that it has begun."""
        self.leaving = False
        """Whether it is handed back as soon as none of its jobs runs."""
        self.suspect = False
        """Whether one of its jobs may have killed the worker that had it before."""
        self.touched_at = 0.0
        """When it arrived, or a job of it began or ended last; monotonic seconds."""

    @property
    def durable(self) -> bool:
        return self.delivery.lane.kind is LaneKind.JOB
