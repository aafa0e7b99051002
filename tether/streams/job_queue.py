"""Publishes bundles to lanes, and stores and reads the results of durable jobs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from tether.bus.bus import Bus, StoredMessage
from tether.domain.job import SHARED, Lane
from tether.errors import ResultConflict, VersionConflict


class BusQueue:
    """Publishes bundles to lanes."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def enqueue(
        self,
        lane: Lane,
        frame: bytes,
        *,
        message_id: str,
        ttl_s: float | None,
        timeout: float = 2.0,
    ) -> None:
        """Publish a bundle; return when the broker has stored it. A repeated ``message_id`` is ignored.

        Raises:
            QueueFull: nothing was stored.
            BrokerUnavailable: unknown whether it was stored; retry with the same id.
        """
        headers = {"Nats-Msg-Id": message_id}
        if ttl_s is not None:
            headers["Nats-TTL"] = str(max(1, math.ceil(ttl_s)))
        await self._bus.publish_acked(self._bus.names.lane(lane), frame, headers=headers, timeout=timeout)


class BusResults:
    """Stored outcomes, one for each job; the first one wins."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def commit(self, job: str, frame: bytes, *, pool: str = SHARED) -> bool:
        """Store an outcome. Return False if the job already has one.

        The outcome outlives the job's record (the dispatcher deletes that first, and the stream keeps
        messages for longer): a job whose outcome was deleted first could finish a second time.
        """
        try:
            await self._bus.publish_acked(self._bus.names.result(job, pool), frame)
        except ResultConflict:
            return False
        return True

    async def ended(self, jobs: Sequence[str], *, pool: str = SHARED) -> set[str]:
        """Return those of the jobs that have finished; needs permission to store results, not to read them.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        found = await asyncio.gather(*[self._has_ended(job, pool) for job in jobs])
        return {job for job, ended in zip(jobs, found, strict=True) if ended}

    async def _has_ended(self, job: str, pool: str) -> bool:
        try:
            return await self._bus.last_sequence(self._bus.names.result(job, pool)) > 0
        except ResultConflict:
            return True
        except VersionConflict:
            return False  # its outcome is being stored, which may fail; a second one would be refused

    async def find(self, jobs: Sequence[str], *, pool: str = SHARED) -> dict[str, bytes]:
        """Return the stored frames of those jobs of a pool that have finished."""
        return {job: stored.data for job, stored in (await self.stored(jobs, pool=pool)).items()}

    async def stored(self, jobs: Sequence[str], *, pool: str = SHARED) -> dict[str, StoredMessage]:
        """Return what :meth:`find` does, with the broker's metadata of each frame."""
        names, subjects = self._bus.names, {self._bus.names.result(job, pool): job for job in jobs}
        stream = names.pool_results_stream(pool)
        if len(subjects) == 1:
            (subject, job) = next(iter(subjects.items()))
            one = await self._bus.direct_get(stream, subject)
            return {} if one is None else {job: one}
        found = await self._bus.direct_batch(stream, list(subjects))
        return {subjects[subject]: stored for subject, stored in found.items()}
