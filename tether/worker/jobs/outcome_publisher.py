"""Publishes outcomes: reply bundles for gateways that wait, one stored result for each durable job."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from tether.bus.bus import Bus
from tether.crypto import MessageType
from tether.domain.job import Failure, JobState, Outcome
from tether.errors import BrokerUnavailable, PayloadTooLarge, QueueFull, ResultTooLarge, StorageFull, TetherError
from tether.process import metrics
from tether.process.log_rate_limiter import LogRateLimiter
from tether.streams.job_queue import BusResults
from tether.wire import codec
from tether.worker.jobs.results_room import ResultsRoom

log = logging.getLogger(__name__)

ROOM_S = 10.0
"""Seconds that outputs wait for space in the results stream before their job fails."""

_RETRY_S = 0.25
_WAITS_S = 1.0
"""Seconds after which an outcome that is not stored is reported."""

_TOLD_S = 60.0


class OutcomePublisher:
    """Publishes outcomes for one worker."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._results = BusResults(bus)
        self._room = ResultsRoom(bus)
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=_TOLD_S)
        self._waiting: dict[str, str] = {}

    @property
    def waiting(self) -> str:
        """Return why outcomes of durable jobs are not stored; empty while they are."""
        if not self._waiting:
            return ""
        return f"{len(self._waiting)} outcomes of durable jobs are not stored yet: {next(iter(self._waiting.values()))}"

    async def reply(self, to: str, outcomes: Sequence[Outcome]) -> None:
        """Send outcomes to a gateway in as few messages as possible.

        Raises:
            BrokerUnavailable: not all were sent; the bundle must be redelivered.
        """
        for group in self._grouped(outcomes):
            ids = tuple(outcome.job for outcome in group)
            frame = self._bus.signer.sign_envelope(MessageType.ANSWER, to, codec.encode_outcomes(group), jobs=ids)
            await self._bus.publish(to, frame)

    def _grouped(self, outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
        groups: list[list[Outcome]] = []
        filled = 0
        for outcome in map(self._fitting, outcomes):
            size = _size(outcome)
            if not groups or filled + size > self._bus.room or len(groups[-1]) >= self._bus.settings.bundle_max_jobs:
                groups.append([])
                filled = 0
            groups[-1].append(outcome)
            filled += size
        return groups

    def _fitting(self, outcome: Outcome) -> Outcome:
        return outcome if _size(outcome) <= self._bus.room else self._too_large(outcome)

    def _too_large(self, outcome: Outcome) -> Outcome:
        error = ResultTooLarge(
            f"the outputs take {_size(outcome)} bytes and a response may have {self._bus.room}; request fewer outputs"
        )
        return _failed(outcome, error)

    async def commit(self, model: str, outcomes: Sequence[Outcome]) -> None:
        """Store outcomes of durable jobs; return when each is stored or was refused as a duplicate."""
        await asyncio.gather(*[self._commit_one(model, self._fitting(outcome)) for outcome in outcomes])

    async def _commit_one(self, model: str, outcome: Outcome) -> None:
        """Store one outcome. Retry one without outputs until it is stored.

        It is small, its job does not run again for it, and it takes no run's place
        (:mod:`tether.worker.jobs.commit_slots`).
        """
        clock, pool = self._bus.clock, self._bus.pool
        subject = self._bus.names.result(outcome.job, pool)
        began, full_since = clock.monotonic(), 0.0
        with self._reported_if_slow(outcome.job):
            frame = self._sealed(subject, outcome)
            while True:
                try:
                    first = await self._stored(outcome, frame)
                    break
                except QueueFull as full:
                    full_since = full_since or clock.monotonic()
                    if _has_outputs(outcome) and clock.monotonic() - full_since >= ROOM_S:
                        outcome = self._without_room(model, outcome)
                        frame = self._sealed(subject, outcome)
                        continue
                    reason: TetherError = full
                except (BrokerUnavailable, StorageFull) as away:
                    full_since, reason = 0.0, away
                except PayloadTooLarge:
                    if not _has_outputs(outcome):
                        raise
                    outcome = self._too_large(outcome)
                    frame = self._sealed(subject, outcome)
                    continue
                if clock.monotonic() - began >= _WAITS_S:
                    self._report_waiting(outcome.job, reason)
                await asyncio.sleep(_RETRY_S)
        if first:
            metrics.JOBS_FINISHED.labels(model, outcome.state.value).inc()
        else:
            metrics.RESULTS_REFUSED.inc()

    async def _stored(self, outcome: Outcome, frame: bytes) -> bool:
        """Store an outcome; return False if the job already has one."""
        if not _has_outputs(outcome):
            return await self._results.commit(outcome.job, frame, pool=self._bus.pool)
        async with self._room.storing(len(frame)):
            return await self._results.commit(outcome.job, frame, pool=self._bus.pool)

    def _sealed(self, subject: str, outcome: Outcome) -> bytes:
        body = codec.encode_outcomes([outcome])
        return self._bus.signer.sign_envelope(
            MessageType.RESULT, subject, body, jobs=(outcome.job,), attempt=outcome.attempts
        )

    def _without_room(self, model: str, outcome: Outcome) -> Outcome:
        error = StorageFull(
            f"no space in the results stream for {_size(outcome)} bytes of outputs within {ROOM_S:g} s; "
            "check that a dispatcher runs, lower result_ttl_s, or raise max_file_mb"
        )
        metrics.RESULTS_WITHOUT_ROOM.labels(model).inc()
        return _failed(outcome, error)

    @contextmanager
    def _reported_if_slow(self, job: str) -> Iterator[None]:
        try:
            yield
        finally:
            if self._waiting.pop(job, None) is not None:
                metrics.RESULTS_WAITING.dec()

    def _report_waiting(self, job: str, reason: TetherError) -> None:
        if job not in self._waiting:
            metrics.RESULTS_WAITING.inc()
        self._waiting[job] = reason.message
        if self._told.passes(reason.code) is not None:
            log.warning("%s", self.waiting, extra={"action": "results_wait", "code": reason.code})


def _has_outputs(outcome: Outcome) -> bool:
    return bool(outcome.outputs) or outcome.sealed is not None


def _failed(outcome: Outcome, error: TetherError) -> Outcome:
    """Return the outcome as failed, without outputs."""
    failure = Failure(error.code, error.message)
    return msgspec.structs.replace(outcome, state=JobState.FAILED, outputs=(), error=failure, sealed=None)


def _size(outcome: Outcome) -> int:
    if outcome.sealed is not None:
        return 256 + len(outcome.sealed.box)
    return 256 + sum(len(tensor.data) + len(tensor.name) + 64 for tensor in outcome.outputs)
