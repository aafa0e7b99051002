"""Outcomes that a gateway commits for durable jobs: cancelled or expired."""

from __future__ import annotations

import logging
from typing import Any

from tether.bus.bus import Bus
from tether.bus.retry import RetryDeadline
from tether.crypto import MessageType
from tether.domain.job import Failure, JobRecord, JobState, Outcome
from tether.process import metrics
from tether.streams.job_queue import BusResults
from tether.wire import codec

log = logging.getLogger(__name__)


class JobEnds:
    """Commits outcomes; the first outcome of a job wins, whoever commits it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._results = BusResults(bus)

    async def end(self, record: JobRecord, state: JobState, failure: Failure, attempts: int) -> bool:
        """Store a job's outcome; return False if it already had one.

        Raises:
            BrokerUnavailable, QueueFull
        """
        job = record.id
        outcome = Outcome(job, state, (), failure, attempts, self._bus.signer.name, 0.0, self._bus.clock.utc())
        subject = self._bus.names.result(job, record.pool)
        frame = self._bus.signer.sign_envelope(
            MessageType.RESULT, subject, codec.encode_outcomes([outcome]), jobs=(job,)
        )
        first = await RetryDeadline(self._bus).until_done(lambda: self._commit(record, frame))
        if first:
            metrics.JOBS_FINISHED.labels(record.model, state.value).inc()
            log.info(
                "job cancelled or expired by the gateway",
                extra={"action": "job_ended", "state": state.value, **ids_of(record)},
            )
        return first

    async def _commit(self, record: JobRecord, frame: bytes) -> bool:
        """Commit idempotently: an earlier try whose reply was lost counts as success."""
        if await self._results.commit(record.id, frame, pool=record.pool):
            return True
        found = await self._results.find([record.id], pool=record.pool)
        return found.get(record.id) == frame


def ids_of(record: JobRecord) -> dict[str, Any]:
    """Return the fields that identify a job in logs."""
    return {
        "job_id": record.id,
        "request_id": record.request_id,
        "tenant": record.tenant,
        "model": record.model,
        "version": record.version,
    }
