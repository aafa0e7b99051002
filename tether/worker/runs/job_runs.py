"""Runs of one version in a worker: jobs in, how each of them ended out."""

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


class End(NamedTuple):
    """How a job ended; ``None``: its caller has been answered before."""

    ticket: JobTicket
    outcome: Outcome | None


def _why(going: ActiveRun, segment: batching.Segment, now: float) -> TetherError:
    match going.cause:
        case Cause.TIME:
            return InferenceFailed(f"the run took longer than {going.run_timeout_s:g} s and was ended")
        case Cause.MEMORY:
            return InferenceFailed("the run took more than 'run_memory_mb' of the worker's memory and was ended")
        case Cause.UNWANTED if segment.source.job.deadline <= now + _ABOUT_S:
            return DeadlineExceeded("the deadline passed while the job ran")
        case Cause.UNWANTED:
            return JobCancelled("nobody waits for the job any more")
    raise Unavailable("the model is being unloaded")


_STATES = {DeadlineExceeded: JobState.EXPIRED, JobCancelled: JobState.CANCELLED}
_ABOUT_S = 0.01
"""How much earlier than its time a timer may be."""


class RunListeners(NamedTuple):
    """Who hears what only the runs of a version show."""

    lost: Callable[[Exception], None]
    """It cannot be loaded any more."""
    mixed: Callable[[str], None]
    """It does not keep rows apart."""
    over: Callable[[str], None]
    """A run took more than it may in the worker's own process."""


class Runs:
    """Makes the runs of one version and learns from them. ``room``: bytes that the outputs of one job may have."""

    def __init__(
        self, worker: str, clock: Clock, model: str, apart: IsolatedInstance, hearing: RunListeners, *, room: int
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._model = model
        self._apart = apart
        self._hearing = hearing
        self._room = room
        self.pace = PullPace()
        self.capacity = Capacity()
        self.running = 0
        """Jobs that run now."""

    async def run(
        self, wanted: batching.Run, going: ActiveRun, *, suspect: bool = False
    ) -> tuple[batching.Done, float, float]:
        """How a run ended, and the times (UTC seconds) when it began and ended. ``suspect``: it may have ended a worker, so it runs
        in a process of its own; so does, once more, one that was ended because it took too much memory.

        Raises:
            Unavailable: it was ended because the version is unloaded.
        """
        self.running += len(wanted.segments)
        try:
            ran = await (self._apart if suspect else self._apart.copies).run(wanted, going)
            if going.cause is Cause.MEMORY:
                ran = await self._elsewhere(wanted, going, ran)
        finally:
            self.running -= len(wanted.segments)
        self.pace.ran(ran.seconds, wanted.jobs)
        self.capacity.ran(ran.seconds, wanted.jobs)
        metrics.BATCH_ROWS.labels(self._model).observe(wanted.rows)
        metrics.RUN_SECONDS.labels(self._model).observe(ran.seconds)
        finished = self._clock.utc()
        return self._by_cause(going, wanted, ran.done, finished), finished - ran.seconds, finished

    async def _elsewhere(self, wanted: batching.Run, going: ActiveRun, ran: RunResult) -> RunResult:
        """A run that was ended for want of memory is made again in a process of its own, unless it was done before it ended."""
        guilty = going.alone
        if any(not isinstance(result, tuple) for result in ran.done.results):
            going.again()
            ran = await self._apart.run(wanted, going)
        if guilty:
            self._hearing.over("took more than 'run_memory_mb' of memory")
        return ran

    def _by_cause(self, going: ActiveRun, wanted: batching.Run, done: batching.Done, now: float) -> batching.Done:
        """The results of a run that was ended: what it has none of says why."""
        if going.cause is None:
            return done
        if going.cause is Cause.TIME:
            self._hearing.over(f"took longer than {going.run_timeout_s:g} s")
        pairs = zip(done.results, wanted.segments, strict=True)
        return done._replace(
            results=[result if isinstance(result, tuple) else _why(going, segment, now) for result, segment in pairs]
        )

    def ends(
        self, turn: NextRun, done: batching.Done, started: float, finished: float
    ) -> tuple[list[End], list[JobTicket]]:
        """The jobs that ended with this run; and those that must run whole, because it did not keep rows apart."""
        ends: list[End] = []
        again: list[JobTicket] = []
        mixed = done.mixed
        for segment, result, ticket, parts in zip(
            turn.run.segments, done.results, turn.tickets, turn.parts, strict=True
        ):
            if ticket.ended or ticket.parts is not parts:
                continue  # it was dropped, or runs whole from its first row on
            ticket.began = ticket.began or started
            if result is None or (done.mixed and not turn.run.own):
                again.append(ticket)
            elif isinstance(result, TetherError):
                ends.append(self._end(ticket, result, finished))
            elif parts.add(segment, result) > self._room:
                too_large = ResultTooLarge(
                    f"the outputs take more than the {self._room} bytes that one answer may have"
                )
                ends.append(self._end(ticket, too_large, finished))
            elif parts.complete:
                outputs, unlike = parts.together()
                mixed = mixed or unlike
                if unlike:
                    again.append(ticket)
                else:
                    ends.append(self._end(ticket, outputs, finished))
        if mixed:
            self._hearing.mixed(mixed)
        return ends, again

    def _end(self, ticket: JobTicket, result: batching.Result, finished: float) -> End:
        ticket.ended = True
        job, attempt, worker = ticket.job, ticket.attempt, self._worker
        if isinstance(result, TetherError):
            ids = {"job_id": job.id, "request_id": job.request_id, "tenant": job.tenant, "model": self._model}
            # a model's words may hold what it was sent
            words = result.message if job.sealed is None else "its words are sealed"
            log.info("a job failed: %s", words, extra={"action": "job_failed", "code": result.code, **ids})
            failure, state = Failure(result.code, result.message), _STATES.get(type(result), JobState.FAILED)
            return End(ticket, Outcome(job.id, state, (), failure, attempt, worker, ticket.began, finished))
        return End(ticket, Outcome(job.id, JobState.SUCCEEDED, result, None, attempt, worker, ticket.began, finished))

    def expired(self, ticket: JobTicket) -> End:
        """The end of a job that is past its deadline before it could run, or all of it could."""
        failure = Failure(DeadlineExceeded.code, "the deadline passed before the job could run")
        return self._not_run(ticket, JobState.EXPIRED, failure)

    def withdrawn(self, ticket: JobTicket) -> End:
        """The end of a job that nobody waits for any more."""
        return self._not_run(ticket, JobState.CANCELLED, Failure(JobCancelled.code, "its client left before it began"))

    def _not_run(self, ticket: JobTicket, state: JobState, failure: Failure) -> End:
        ticket.ended = True
        job, attempt = ticket.job, ticket.attempt or ticket.bundle.delivery.attempt
        now, worker = self._clock.utc(), self._worker
        return End(ticket, Outcome(job.id, state, (), failure, attempt - 1, worker, ticket.began, now))
