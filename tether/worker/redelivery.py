"""Bundles that come again: one job at a time, each attempt noted before it begins.

A worker that died with a bundle in its hands may have died of one of its jobs. So that such a job takes no neighbours
with it, every job of a redelivered bundle runs alone, and a note is stored before each run. Whoever gets the bundle
next sees from the notes which job was running when the worker before it died.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.bus.queue import BusResults
from tether.envelope import MessageType
from tether.errors import AttemptsExhausted, PayloadTooLarge, QueueFull
from tether.job import AttemptNote, Failure, Job, JobState, LaneKind, Outcome

if TYPE_CHECKING:
    from tether.worker.instance import ModelInstance
    from tether.worker.intake import Bundle

log = logging.getLogger(__name__)


_ANSWERED = 0
"""As the attempt of a job whose caller has its answer; infer lanes keep no results that would tell."""


class Redelivery:
    """Works off redelivered bundles for one model instance."""

    def __init__(self, bus: Bus, instance: ModelInstance) -> None:
        self._bus = bus
        self._instance = instance
        self._results = BusResults(bus)
        self._notes = SignedBucket(bus, "attempts", MessageType.ATTEMPT)

    async def work(self, bundle: Bundle) -> None:
        """Run what has not ended yet, job by job, answering after each; then acknowledge."""
        durable = bundle.delivery.lane.kind is LaneKind.JOB
        ended = await self._results.find([job.id for job in bundle.jobs], scope=self._bus.scope) if durable else {}
        for job in bundle.jobs:
            if job.id not in ended:
                await self._alone(bundle, job)
        await bundle.delivery.ack()

    async def _alone(self, bundle: Bundle, job: Job) -> None:
        last = await self._last_attempt(job)
        if last == _ANSWERED:
            return
        attempt = last + 1
        if attempt > self._bus.settings.max_attempts:
            outcome = await self._bury(bundle, job, attempt - 1)
        else:
            await self._note(job, attempt)
            (outcome,) = await self._instance.run([job], attempt)
        await self._instance.deliver([bundle], [outcome])
        if bundle.delivery.lane.kind is LaneKind.INFER:
            await self._note(job, _ANSWERED)

    async def _note(self, job: Job, attempt: int) -> None:
        note = AttemptNote(attempt, self._bus.signer.name, self._bus.clock.utc())
        await self._notes.put(self._bus.names.attempt_key(job.id, self._bus.scope), codec.encode(note))

    async def _last_attempt(self, job: Job) -> int:
        """The first try was in the bundle; after that, the last note says it."""
        stored = await self._notes.get(self._bus.names.attempt_key(job.id, self._bus.scope))
        return 1 if stored is None else codec.decode(stored, AttemptNote).attempt

    async def _bury(self, bundle: Bundle, job: Job, attempts: int) -> Outcome:
        """Store the dead letter, with the original frame inside, before the job is told to be dead."""
        error = AttemptsExhausted(f"{attempts} attempts ended without an answer; the job may crash its worker")
        lane = bundle.delivery.lane
        subject = self._bus.names.dead(lane)
        letter = {
            "job": job.id,
            "code": error.code,
            "message": error.message,
            "attempts": attempts,
            "lane": self._bus.names.lane(lane),
            "frame": bundle.delivery.frame,
        }
        try:
            await self._keep_letter(subject, letter, job)
        except QueueFull as full:
            # its end is kept all the same, and the jobs behind it in the bundle must not wait for room
            log.warning("a dead letter is lost: %s", full, extra={"action": "dead_letter_lost", "job_id": job.id})
        metrics.DEAD_LETTERS.labels(lane.model).inc()
        log.error("a job is dead: %s", error, extra={"action": "job_dead", "job_id": job.id, "model": lane.model})
        return Outcome(
            job.id,
            JobState.DEAD,
            (),
            Failure(error.code, error.message),
            attempts,
            self._bus.signer.name,
            0.0,
            self._bus.clock.utc(),
        )

    async def _keep_letter(self, subject: str, letter: dict[str, object], job: Job) -> None:
        """Whole, or without its neighbours when that is too large."""
        message_id = f"dead:{job.id}"
        try:
            await self._publish(subject, letter, message_id)
        except PayloadTooLarge:
            body = codec.encode_jobs([job])
            await self._publish(subject, {**letter, "frame": b"", "body": body}, message_id)

    async def _publish(self, subject: str, letter: dict[str, object], message_id: str) -> None:
        frame = self._bus.signer.seal(MessageType.DEAD, subject, codec.pack(letter), message_id=message_id)
        await self._bus.publish_acked(subject, frame, headers={"Nats-Msg-Id": message_id})
