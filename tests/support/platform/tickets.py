"""Jobs in a worker's hands, without a broker: deliveries of any lane, and a queue that is worked off on one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tether.bus.bus import Bus
from tether.crypto import Header
from tether.domain.job import Job, Lane, LaneKind, Outcome, Priority
from tether.errors import Unavailable
from tether.frameworks.runtime import Runtime
from tether.process.clock import SystemClock
from tether.streams.lane_consumer import Delivery
from tether.worker.models.instances import InstancePool, InstanceSet
from tether.worker.runs.isolated_instance import CrashListeners as ApartHearing
from tether.worker.runs.isolated_instance import IsolatedInstance, Seats
from tether.worker.runs.job_runs import RunListeners, Runs
from tether.worker.scheduling import batching
from tether.worker.scheduling.bundle import Bundle
from tether.worker.scheduling.job_turns import JobTicket, RunQueue

LANES = (
    Lane(LaneKind.INFER, "m", 1),
    *[Lane(LaneKind.JOB, "m", 1, priority=level) for level in (Priority.HIGH, Priority.NORMAL, Priority.LOW)],
)
"""By level."""


@dataclass
class _Message:
    subject: str = "lane"
    data: bytes = b""
    reply: str = "$JS.ACK.s.c.1.1.1.1.0"
    headers: dict[str, str] | None = None


def bundle(level: int, jobs: Sequence[Job]) -> Bundle:
    """A verified message of a lane that nobody can settle."""
    delivery = Delivery(cast("Bus", None), LANES[level], _Message())
    return Bundle(delivery, cast("Header", None), list(jobs))


def put(queue: RunQueue, level: int, *jobs: Job, alone: bool = False) -> Bundle:
    """Jobs that came in one message, in the queue."""
    made = bundle(level, jobs)
    for job in jobs:
        queue.add(JobTicket(job, made, alone=alone))
    return made


async def _nothing() -> InstanceSet:
    raise Unavailable("there is no model")


def work_off(queue: RunQueue, model: Runtime, limit: int) -> tuple[list[Outcome], str]:
    """Run everything in order, as a worker does: how each job ended, and what showed that rows were not kept apart."""
    found: list[str] = []
    clock = SystemClock()
    apart = IsolatedInstance(InstancePool(_nothing, clock), _nothing, ApartHearing(found.append, found.append), Seats())
    runs = Runs("worker-1", clock, "m", apart, RunListeners(lambda _: None, found.append, found.append), room=1 << 30)
    outcomes: list[Outcome] = []
    while queue:
        level = next(level for level in queue.order(0.0) if queue.has(level))
        turn = queue.take(level, 0 if found else limit, 0.0)
        ends, again = runs.finished_jobs(turn, batching.run(model, turn.run), 1.0, 2.0)
        outcomes += [end.outcome for end in ends if end.outcome is not None]
        for end in ends:
            queue.remove(lambda ticket: ticket is end.ticket)  # noqa: B023
        for ticket in again:
            queue.requeue_whole(ticket)
    return outcomes, found[0] if found else ""
