"""Runs of one version in a worker: jobs in, how each of them ended out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from tether import metrics
from tether.errors import DeadlineExceeded, JobCancelled, TetherError
from tether.job import Failure, JobState, Outcome
from tether.ports import Clock
from tether.worker import batching
from tether.worker.apart import Apart
from tether.worker.balance import Capacity
from tether.worker.pace import Pace
from tether.worker.turns import Ticket, Turn

log = logging.getLogger(__name__)


class End(NamedTuple):
    """How a job ended; ``None``: its caller has been answered before."""

    ticket: Ticket
    outcome: Outcome | None


class Runs:
    """Makes the runs of one version and learns from them. ``mixed`` hears that it does not keep rows apart."""

    def __init__(self, worker: str, clock: Clock, model: str, apart: Apart, *, mixed: Callable[[str], None]) -> None:
        self._worker = worker
        self._clock = clock
        self._model = model
        self._apart = apart
        self._mixed = mixed
        self.pace = Pace()
        self.capacity = Capacity()
        self.running = 0
        """Jobs that run now."""

    async def run(self, wanted: batching.Run, *, suspect: bool = False) -> tuple[batching.Done, float, float]:
        """How a run ended, and the times (UTC seconds) when it began and ended. ``suspect``: it may have ended a worker, so it runs
        in a process of its own."""
        self.running += len(wanted.pieces)
        try:
            ran = await (self._apart if suspect else self._apart.copies).run(wanted)
        finally:
            self.running -= len(wanted.pieces)
        self.pace.ran(ran.seconds, wanted.jobs)
        self.capacity.ran(ran.seconds, wanted.jobs)
        metrics.BATCH_ROWS.labels(self._model).observe(wanted.rows)
        metrics.RUN_SECONDS.labels(self._model).observe(ran.seconds)
        finished = self._clock.utc()
        return ran.done, finished - ran.seconds, finished

    def ends(self, turn: Turn, done: batching.Done, started: float, finished: float) -> tuple[list[End], list[Ticket]]:
        """The jobs that ended with this run; and those that must run whole, because it did not keep rows apart."""
        ends: list[End] = []
        again: list[Ticket] = []
        mixed = done.mixed
        for piece, result, ticket, parts in zip(turn.run.pieces, done.results, turn.tickets, turn.parts, strict=True):
            if ticket.ended or ticket.parts is not parts:
                continue  # it was dropped, or runs whole from its first row on
            ticket.began = ticket.began or started
            if result is None or (done.mixed and not turn.run.own):
                again.append(ticket)
            elif isinstance(result, TetherError):
                ends.append(self._end(ticket, result, finished))
            elif parts.add(piece, result):
                outputs, unlike = parts.together()
                mixed = mixed or unlike
                if unlike:
                    again.append(ticket)
                else:
                    ends.append(self._end(ticket, outputs, finished))
        if mixed:
            self._mixed(mixed)
        return ends, again

    def _end(self, ticket: Ticket, result: batching.Result, finished: float) -> End:
        ticket.ended = True
        job, attempt, worker = ticket.job, ticket.attempt, self._worker
        if isinstance(result, TetherError):
            ids = {"job_id": job.id, "request_id": job.request_id, "tenant": job.tenant, "model": self._model}
            log.info("a job failed: %s", result, extra={"action": "job_failed", "code": result.code, **ids})
            failure = Failure(result.code, result.message)
            return End(ticket, Outcome(job.id, JobState.FAILED, (), failure, attempt, worker, ticket.began, finished))
        return End(ticket, Outcome(job.id, JobState.SUCCEEDED, result, None, attempt, worker, ticket.began, finished))

    def expired(self, ticket: Ticket) -> End:
        """The end of a job that is past its deadline before it could run, or all of it could."""
        failure = Failure(DeadlineExceeded.code, "the deadline passed before the job could run")
        return self._not_run(ticket, JobState.EXPIRED, failure)

    def withdrawn(self, ticket: Ticket) -> End:
        """The end of a job that nobody waits for any more."""
        return self._not_run(ticket, JobState.CANCELLED, Failure(JobCancelled.code, "its client left before it began"))

    def _not_run(self, ticket: Ticket, state: JobState, failure: Failure) -> End:
        ticket.ended = True
        job, attempt = ticket.job, ticket.attempt or ticket.bundle.delivery.attempt
        now, worker = self._clock.utc(), self._worker
        return End(ticket, Outcome(job.id, state, (), failure, attempt - 1, worker, ticket.began, now))
