"""Outcomes on their way out: reply bundles for waiting gateways, one committed result for each durable job."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.queue import BusResults
from tether.envelope import MessageType
from tether.errors import BrokerUnavailable, PayloadTooLarge, QueueFull, ResultTooLarge, StorageFull
from tether.job import Failure, JobState, Outcome

_RETRY_S = 0.25


class Answers:
    """Publishes outcomes for one worker."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._results = BusResults(bus)

    async def reply(self, to: str, outcomes: Sequence[Outcome]) -> None:
        """Send reply bundles to a gateway: as few messages as fit.

        Raises:
            BrokerUnavailable: not all were sent; the bundle must come again.
        """
        for group in self._grouped(outcomes):
            ids = tuple(outcome.job for outcome in group)
            frame = self._bus.signer.seal(MessageType.ANSWER, to, codec.encode_outcomes(group), jobs=ids)
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
            f"the outputs take {_size(outcome)} bytes; one answer may have {self._bus.room}: ask for fewer outputs"
        )
        return msgspec.structs.replace(
            outcome, state=JobState.FAILED, outputs=(), error=Failure(error.code, error.message), sealed=None
        )

    async def commit(self, model: str, outcomes: Sequence[Outcome]) -> None:
        """Store how durable jobs ended; returns when every one is stored or was refused as second."""
        await asyncio.gather(*[self._commit_one(model, self._fitting(outcome)) for outcome in outcomes])

    async def _commit_one(self, model: str, outcome: Outcome) -> None:
        scope = self._bus.scope
        subject = self._bus.names.result(outcome.job, scope)
        frame = self._bus.signer.seal(
            MessageType.RESULT, subject, codec.encode_outcomes([outcome]), jobs=(outcome.job,), attempt=outcome.attempts
        )
        while True:
            try:
                first = await self._results.commit(outcome.job, frame, scope=scope)
            except (BrokerUnavailable, QueueFull, StorageFull):
                await asyncio.sleep(_RETRY_S)
                continue
            except PayloadTooLarge:
                if not outcome.outputs and outcome.sealed is None:
                    raise
                await self._commit_one(model, self._too_large(outcome))
                return
            if first:
                metrics.JOBS_FINISHED.labels(model, outcome.state.value).inc()
            else:
                metrics.RESULTS_REFUSED.inc()
            return


def _size(outcome: Outcome) -> int:
    if outcome.sealed is not None:
        return 256 + len(outcome.sealed.box)
    return 256 + sum(len(tensor.data) + len(tensor.name) + 64 for tensor in outcome.outputs)
