"""Runs redelivered bundles one job at a time, and records each attempt before it begins.

A job may have killed the worker that had the bundle. So every job of a redelivered bundle runs alone, and a
note is stored before each run: the next worker reads there which job was running when the last one died.

A bundle that a living worker handed back is not suspect. That worker's note says so, and its jobs are batched
as on a first delivery.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import GONE, SignedBucket
from tether.crypto import MessageType
from tether.domain.job import AttemptNote, Failure, Job, JobState, Outcome
from tether.errors import AttemptsExhausted, BrokerUnavailable, PayloadTooLarge, QueueFull, StorageFull, TetherError
from tether.process import metrics
from tether.wire import codec
from tether.worker.scheduling.bundle import Bundle

log = logging.getLogger(__name__)


NOTED_S = 0.1
"""Seconds after which a note is stored for a bundle on its first delivery."""

_ANSWERED = 0
"""Attempt number of a job whose caller has its response; infer lanes store no results that would show it."""


class Redelivery:
    """Attempt notes and dead letters of one model's bundles."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus = bus
        self._model = model
        self._notes = SignedBucket(bus, "attempts", MessageType.ATTEMPT)

    async def is_suspect(self, bundle: Bundle) -> bool:
        """Return True if the bundle may have killed a worker: it was delivered before and not handed back."""
        if bundle.delivery.attempt == 1:
            return False
        note = await self._stored(bundle.header.message_id)
        harmless = note is not None and note.attempt == 0 and note.deliveries == bundle.delivery.attempt - 1
        if not harmless:
            metrics.REDELIVERED.labels(self._model).inc()
        return not harmless

    async def record_begin(self, bundle: Bundle) -> None:
        """Record that a new bundle began, for job status; skip bundles that finish at once."""
        await asyncio.sleep(NOTED_S)
        if not bundle.unfinished or (bundle.leaving and not bundle.running):
            return  # the bundle finished, or was handed back with its own note
        bundle.noted = True
        try:
            await self._put(bundle.header.message_id, 1)
        except TetherError as error:
            log.info(
                "could not store a note that a bundle began: %s",
                error,
                extra={"action": "note_lost", "code": error.code},
            )

    async def hand_back(self, bundle: Bundle) -> None:
        """Hand the bundle to another worker, with a note so that its jobs do not run one by one there."""
        if not bundle.suspect:
            try:
                await self._put(bundle.header.message_id, 0, bundle.delivery.attempt)
            except TetherError as error:
                log.info(
                    "handed a bundle back without a note: %s", error, extra={"action": "note_lost", "code": error.code}
                )
        await bundle.delivery.give_back()

    async def record_attempt(self, bundle: Bundle, job: Job) -> int | Outcome | None:
        """Record the next attempt of a job of a suspect bundle before it runs.

        Return the attempt number; an outcome if no attempt is left; None if its caller has its response.
        """
        last = await self._last_attempt(job)
        if last == _ANSWERED:
            return None
        if last >= self._bus.settings.max_attempts:
            return await self._dead_letter(bundle, job, last)
        await self._put(job.id, last + 1)
        return last + 1

    async def record_answered(self, job: Job) -> None:
        """Record that a job of a suspect infer bundle is answered, so that no other worker runs it."""
        await self._put(job.id, _ANSWERED)

    async def delete_notes(self, bundle: Bundle) -> None:
        """Delete the notes of an acknowledged bundle. A note that cannot be deleted expires."""
        again = bundle.delivery.attempt > 1
        keys = [bundle.header.message_id] if again or bundle.noted else []
        keys += [job.id for job in bundle.jobs] if bundle.suspect else []
        for key in keys:
            subject = self._notes.raw.subject(self._bus.names.attempt_key(key, self._bus.pool))
            with suppress(BrokerUnavailable):
                await self._bus.publish(subject, b"", headers=dict(GONE))

    async def _put(self, of: str, attempt: int, deliveries: int = 0) -> None:
        note = AttemptNote(attempt, self._bus.signer.name, self._bus.clock.utc(), deliveries)
        await self._notes.put(self._bus.names.attempt_key(of, self._bus.pool), codec.encode(note))

    async def _stored(self, of: str) -> AttemptNote | None:
        stored = await self._notes.get(self._bus.names.attempt_key(of, self._bus.pool))
        return None if stored is None else codec.decode(stored, AttemptNote)

    async def _last_attempt(self, job: Job) -> int:
        """Return the number of the last attempt by the stored note; 1 without one, for the first delivery."""
        note = await self._stored(job.id)
        return 1 if note is None else note.attempt

    async def _dead_letter(self, bundle: Bundle, job: Job, attempts: int) -> Outcome:
        """Store the dead letter, with the original frame inside, before the job is marked dead."""
        error = AttemptsExhausted(f"{attempts} attempts ended without a result; the job may crash its worker")
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
        except (QueueFull, StorageFull) as full:
            # the outcome is stored even so: the next jobs of the bundle must not wait for space
            log.warning(
                "could not store a dead letter: %s", full, extra={"action": "dead_letter_lost", "job_id": job.id}
            )
        metrics.DEAD_LETTERS.labels(lane.model).inc()
        log.error("dead-lettered a job: %s", error, extra={"action": "job_dead", "job_id": job.id, "model": lane.model})
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
        """Store a dead letter whole, or without the bundle's other jobs if it is too large."""
        message_id = f"dead:{job.id}"
        try:
            await self._publish(subject, letter, message_id)
        except PayloadTooLarge:
            body = codec.encode_jobs([job])
            await self._publish(subject, {**letter, "frame": b"", "body": body}, message_id)

    async def _publish(self, subject: str, letter: dict[str, object], message_id: str) -> None:
        frame = self._bus.signer.sign_envelope(MessageType.DEAD, subject, codec.pack(letter), message_id=message_id)
        await self._bus.publish_acked(subject, frame, headers={"Nats-Msg-Id": message_id})
