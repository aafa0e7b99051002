"""Runs the jobs of one version in a worker and returns their outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from tether.domain.job import Failure, JobState, Outcome
from tether.errors import DeadlineExceeded, InferenceFailed, JobCancelled, ResultTooLarge, TetherError, Unavailable
from tether.process import metrics
from tether.process.clock import Clock
from tether.worker.models.instances import RunResult
from tether.worker.models.run_limits import ActiveRun, Cause
from tether.worker.runs.isolated_instance import IsolatedInstance
from tether.worker.scheduling import batching
from tether.worker.scheduling.job_turns import JobTicket, NextRun
from tether.worker.scheduling.pull_balance import Capacity
from tether.worker.scheduling.pull_pace import PullPace

log = logging.getLogger(__name__)


class FinishedJob(NamedTuple):
    """Outcome of a finished job; None if its caller already has a response."""

    ticket: JobTicket
    outcome: Outcome | None


def _why(active_run: ActiveRun, segment: batching.Segment, now: float) -> TetherError:
    match active_run.cause:
        case Cause.TIME:
            return InferenceFailed(f"the run exceeded its timeout of {active_run.run_timeout_s:g} s and was ended")
        case Cause.MEMORY:
            return InferenceFailed("the run exceeded run_memory_mb of the worker's memory and was ended")
        case Cause.UNWANTED if segment.source.job.deadline <= now + _ABOUT_S:
            return DeadlineExceeded("the deadline passed while the job ran")
        case Cause.UNWANTED:
            return JobCancelled("the caller no longer waits for the job")
    raise Unavailable("the model is being unloaded")


_STATES = {DeadlineExceeded: JobState.EXPIRED, JobCancelled: JobState.CANCELLED}
_ABOUT_S = 0.01
"""Seconds by which a timer may fire early."""


class RunListeners(NamedTuple):
    """Callbacks for events that only runs show."""

    lost: Callable[[Exception], None]
    """Called if the version can no longer be loaded."""
    mixed: Callable[[str], None]
    """Called if the model mixes rows of different jobs."""
    over: Callable[[str], None]
    """Called if a run exceeded its limits in the worker's own process."""


class Runs:
    """Executes one version's runs and learns their times. ``room``: maximum bytes of a job's outputs."""

    def __init__(
        self, worker: str, clock: Clock, model: str, isolated: IsolatedInstance, listeners: RunListeners, *, room: int
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._model = model
        self._isolated = isolated
        self._listeners = listeners
        self._max_output_bytes = room
        self.pace = PullPace()
        self.capacity = Capacity()
        self.running = 0
        """Jobs that run now."""

    async def run(
        self, wanted: batching.Run, active_run: ActiveRun, *, suspect: bool = False
    ) -> tuple[batching.Done, float, float]:
        """Execute a run; return its results and the times (UTC seconds) when it began and ended.

        A ``suspect`` run may have killed a worker, so it runs in an isolated process. A run that was ended
        for its memory is repeated there once.

        Raises:
            Unavailable: the run was ended because the version is unloaded.
        """
        self.running += len(wanted.segments)
        try:
            ran = await (self._isolated if suspect else self._isolated.instances).run(wanted, active_run)
            if active_run.cause is Cause.MEMORY:
                ran = await self._rerun_isolated(wanted, active_run, ran)
        finally:
            self.running -= len(wanted.segments)
        self.pace.record_run(ran.seconds, wanted.jobs)
        self.capacity.record_run(ran.seconds, wanted.jobs)
        metrics.BATCH_ROWS.labels(self._model).observe(wanted.rows)
        metrics.RUN_SECONDS.labels(self._model).observe(ran.seconds)
        finished = self._clock.utc()
        return self._fill_missing_results(active_run, wanted, ran.done, finished), finished - ran.seconds, finished

    async def _rerun_isolated(self, wanted: batching.Run, active_run: ActiveRun, ran: RunResult) -> RunResult:
        """Repeat a run in an isolated process after it exceeded its memory, unless it has all results."""
        guilty = active_run.alone
        if any(not isinstance(result, tuple) for result in ran.done.results):
            active_run.reset()
            ran = await self._isolated.run(wanted, active_run)
        if guilty:
            self._listeners.over("took more than 'run_memory_mb' of memory")
        return ran

    def _fill_missing_results(
        self, active_run: ActiveRun, wanted: batching.Run, done: batching.Done, now: float
    ) -> batching.Done:
        """Fill the missing results of a run that was ended with the reason."""
        if active_run.cause is None:
            return done
        if active_run.cause is Cause.TIME:
            self._listeners.over(f"took longer than {active_run.run_timeout_s:g} s")
        pairs = zip(done.results, wanted.segments, strict=True)
        return done._replace(
            results=[
                result if isinstance(result, tuple) else _why(active_run, segment, now) for result, segment in pairs
            ]
        )

    def finished_jobs(
        self, turn: NextRun, done: batching.Done, started: float, finished: float
    ) -> tuple[list[FinishedJob], list[JobTicket]]:
        """Return the jobs finished with this run, and those to repeat whole because rows were mixed."""
        finished_jobs: list[FinishedJob] = []
        repeated: list[JobTicket] = []
        mixed = done.mixed
        for segment, result, ticket, parts in zip(
            turn.run.segments, done.results, turn.tickets, turn.parts, strict=True
        ):
            if ticket.ended or ticket.parts is not parts:
                continue  # it was dropped, or is repeated whole from its first row
            ticket.began = ticket.began or started
            if result is None or (done.mixed and not turn.run.own):
                repeated.append(ticket)
            elif isinstance(result, TetherError):
                finished_jobs.append(self._finish(ticket, result, finished))
            elif parts.add(segment, result) > self._max_output_bytes:
                too_large = ResultTooLarge(
                    f"the outputs take more than the {self._max_output_bytes} bytes that a response may have"
                )
                finished_jobs.append(self._finish(ticket, too_large, finished))
            elif parts.complete:
                outputs, unlike = parts.together()
                mixed = mixed or unlike
                if unlike:
                    repeated.append(ticket)
                else:
                    finished_jobs.append(self._finish(ticket, outputs, finished))
        if mixed:
            self._listeners.mixed(mixed)
        return finished_jobs, repeated

    def _finish(self, ticket: JobTicket, result: batching.Result, finished: float) -> FinishedJob:
        ticket.ended = True
        job, attempt, worker = ticket.job, ticket.attempt, self._worker
        if isinstance(result, TetherError):
            ids = {"job_id": job.id, "request_id": job.request_id, "tenant": job.tenant, "model": self._model}
            # a model's error message may contain its input
            words = result.message if job.sealed is None else "the message is encrypted"
            log.info("job failed: %s", words, extra={"action": "job_failed", "code": result.code, **ids})
            failure, state = Failure(result.code, result.message), _STATES.get(type(result), JobState.FAILED)
            return FinishedJob(ticket, Outcome(job.id, state, (), failure, attempt, worker, ticket.began, finished))
        return FinishedJob(
            ticket, Outcome(job.id, JobState.SUCCEEDED, result, None, attempt, worker, ticket.began, finished)
        )

    def expired(self, ticket: JobTicket) -> FinishedJob:
        """Return the outcome of a job whose deadline passed before all of it could run."""
        failure = Failure(DeadlineExceeded.code, "the deadline passed before the job could run")
        return self._finish_without_run(ticket, JobState.EXPIRED, failure)

    def withdrawn(self, ticket: JobTicket) -> FinishedJob:
        """Return the outcome of a job whose caller left."""
        return self._finish_without_run(
            ticket, JobState.CANCELLED, Failure(JobCancelled.code, "the caller left before the job began")
        )

    def _finish_without_run(self, ticket: JobTicket, state: JobState, failure: Failure) -> FinishedJob:
        ticket.ended = True
        job, attempt = ticket.job, ticket.attempt or ticket.bundle.delivery.attempt
        now, worker = self._clock.utc(), self._worker
        return FinishedJob(ticket, Outcome(job.id, state, (), failure, attempt - 1, worker, ticket.began, now))
