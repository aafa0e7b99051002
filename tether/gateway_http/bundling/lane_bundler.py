"""Unsent jobs of one lane: decides when a bundle is sent, how many jobs it has, and how many are in flight."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Protocol

from tether.domain.job import Job, JobId, Lane, Outcome
from tether.gateway_http.fair_queue import FairQueue, RunTimeEstimator

_BUSY = 0.4
"""Execution's share of a bundle's round trip above which execution dominates latency."""

_SHARED_S = 1.0
"""How long a lane counts as shared after the tenant of its jobs changed."""

_ALONE_RUN_S = 0.025
"""Target run time of a bundle: a job in flight cannot be overtaken, so longer ones would delay others."""

_SHARED_RUN_S = 0.005
"""The same for a lane that tenants share."""

_SLOW_S = 0.003
"""Bundles that run longer need fewer in flight to keep a worker busy."""

_LEARN = 0.1
"""Weight of the newest bundle in the averages of ``_busy_share`` and ``_usual_in_flight``."""

_ENOUGH = 0.6
"""Fraction of the usual number of jobs in flight that a bundle waits for, while jobs still arrive."""

_MOMENT_S = 0.001
"""Longest gap between arrivals before a bundle is sent."""


class InFlightBundle:
    """One bundle in flight and its unanswered jobs."""

    __slots__ = ("began", "bundler", "ended", "jobs", "message_id", "open", "sending", "sends", "sent_at", "withdrawn")

    def __init__(self, bundler: LaneBundler, jobs: list[Job]) -> None:
        self.bundler = bundler
        self.jobs = jobs
        self.open: set[JobId] = {job.id for job in jobs}
        self.withdrawn: set[JobId] = set()
        """Jobs of ``open`` that were withdrawn. They keep their place in the lane until a worker has dropped
        them, so that a client that repeatedly sends and disconnects cannot fill the lane."""
        self.sends = 0
        self.message_id = ""
        """Id of the message that the broker stored last."""
        self.sending = False
        self.sent_at = 0.0
        self.began = self.ended = 0.0

    @property
    def wanted(self) -> bool:
        """True if a caller still waits for one of its jobs."""
        return len(self.open) > len(self.withdrawn)

    def close(self, job: JobId) -> bool:
        """Mark a job as finished; return True if it was the last one."""
        self.open.discard(job)
        self.withdrawn.discard(job)
        return not self.open

    def ran(self, outcome: Outcome) -> None:
        """Record the first start and the last finish of its jobs, on the worker's clock."""
        if self.began == 0.0 or outcome.started_at < self.began:
            self.began = outcome.started_at
        self.ended = max(self.ended, outcome.finished_at)


class Sender(Protocol):
    """The bundler that a lane sends through."""

    @property
    def settings_delay_s(self) -> float: ...

    @property
    def max_jobs(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    def weight(self, tenant: str, /) -> float: ...

    def now(self) -> float: ...

    def workers(self, lane: Lane) -> int: ...

    def slots(self) -> int: ...

    def is_awaited(self, job: Job) -> bool: ...

    def should_yield(self, job: Job) -> bool: ...

    def launch(self, flight: InFlightBundle) -> None: ...


class LaneBundler:
    """The unsent jobs of one lane."""

    def __init__(self, owner: Sender, lane: Lane) -> None:
        self._owner = owner
        self.lane = lane
        self.held = 0
        """Number of unanswered requests, sent or not."""
        self._pending: FairQueue[Job] = FairQueue(owner.weight)
        self._late: FairQueue[Job] = FairQueue(owner.weight)
        """Jobs that let others pass, by their model's queue policy."""
        self._pace = RunTimeEstimator()
        self._in_flight = 0
        self._jobs_in_flight = 0
        self._busy_share = 1.0
        self._usual_in_flight = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._gathering: asyncio.Handle | None = None
        self._overdue = False
        self._unwanted = 0
        self._tenant = ""
        self._last_shared_at = -_SHARED_S

    def add(self, job: Job) -> None:
        if job.tenant != self._tenant:
            self._last_shared_at = self._owner.now() if self._tenant else self._last_shared_at
            self._tenant = job.tenant
        pending = self._pending
        pending.add(job.tenant, job, job.size)
        if self._overdue:
            return
        if len(pending) >= self._owner.max_jobs or pending.size >= self._owner.max_bytes // 2:
            self._flush()
        elif self._should_send_now():
            self._flush_soon()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._owner.settings_delay_s, self._flush)

    def ended_unsent(self) -> None:
        """Count an unsent job whose caller left. Such jobs are skipped when their turn comes; once they are
        more than half of the queue, all of them are removed to free memory."""
        self._unwanted += 1
        if 2 * self._unwanted > len(self._pending) + len(self._late):
            self._unwanted = 0
            self._pending.prune(self._owner.is_awaited)
            self._late.prune(self._owner.is_awaited)
            self._overdue = self._overdue and bool(self._pending or self._late)

    def _should_send_now(self) -> bool:
        """Return True if a bundle should be sent now.

        Either none is in flight, or a worker is idle and execution dominates latency, or a worker is idle and
        as many jobs are queued as are in flight: then the two halves alternate.
        """
        if self._in_flight == 0:
            return True
        if self._in_flight >= self._owner.workers(self.lane):
            return False
        return self._busy_share > _BUSY or len(self._pending) >= self._jobs_in_flight

    def on_bundle_answered(self, jobs: int, run_s: float, total_s: float) -> None:
        """Record that all ``jobs`` of a bundle are answered, after ``run_s`` seconds of execution in
        ``total_s``; send more."""
        self._usual_in_flight += _LEARN * (self._jobs_in_flight + len(self._pending) - self._usual_in_flight)
        self._jobs_in_flight -= jobs
        if run_s > 0:
            self._busy_share += _LEARN * (min(1.0, run_s / max(total_s, 1e-6)) - self._busy_share)
            self._pace.learn(jobs, min(run_s, total_s))  # a worker's clock may be wrong
        self._in_flight -= 1
        if (self._pending or self._late) and (self._overdue or self._should_send_now()):
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Flush after the event loop has read its pending input, which may bring more jobs for this bundle."""
        if self._gathering is None:
            latest = self._owner.now() + self._owner.settings_delay_s
            self._gathering = asyncio.get_running_loop().call_soon(self._wait_for_stragglers, 0, latest)

    def _wait_for_stragglers(self, before: int, latest: float, *, paused: bool = False) -> None:
        """Flush once most of the usual jobs have arrived, or none came for a moment.

        Callers that were just answered are about to send their next request, and two bundles of half the jobs
        each need the fewest signatures.
        """
        loop, gathered = asyncio.get_running_loop(), len(self._pending)
        if (
            gathered >= _ENOUGH * self._usual_in_flight
            or self._owner.now() >= latest
            or (paused and gathered == before)
        ):
            self._flush()
        elif gathered > before:
            self._gathering = loop.call_soon(self._wait_for_stragglers, gathered, latest)
        else:
            moment = min(_MOMENT_S, latest - self._owner.now())
            self._gathering = loop.call_later(moment, partial(self._wait_for_stragglers, gathered, latest, paused=True))

    def _flush(self) -> None:
        """Send pending jobs within the allowance; the rest is overdue and leaves as soon as a bundle is
        answered."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        owner, pending = self._owner, self._pending
        most, jobs_at_once = self._send_allowance()
        while (pending or self._late) and self._in_flight < most:
            jobs = pending.take(jobs_at_once, owner.max_bytes, self._wanted_and_on_time)
            jobs = jobs or self._late.take(jobs_at_once, owner.max_bytes, owner.is_awaited)
            if jobs:
                self._in_flight += 1
                self._jobs_in_flight += len(jobs)
                owner.launch(InFlightBundle(self, jobs))
        self._overdue = bool(pending or self._late)

    def _wanted_and_on_time(self, job: Job) -> bool:
        """Return True if the job is awaited and on time; a late job moves behind those that are not late."""
        if self._owner.should_yield(job):
            self._late.add(job.tenant, job, job.size)
            return False
        return self._owner.is_awaited(job)

    def _send_allowance(self) -> tuple[int, int]:
        """Return how many bundles may be in flight, and how many jobs each may have.

        Enough to keep every worker busy; on a shared lane little more, because a new job waits for all that
        are in flight.
        """
        owner = self._owner
        workers = owner.workers(self.lane)
        if owner.now() - self._last_shared_at > _SHARED_S:
            return workers * owner.slots(), self._pace.most(owner.max_jobs, _ALONE_RUN_S)
        most = workers + workers // 2 if self._pace.span_s > _SLOW_S else workers * owner.slots()
        return most, self._pace.most(owner.max_jobs, _SHARED_RUN_S)
