"""Bundles that come again: one job at a time, each attempt noted before it begins.

A worker that died with a bundle in its hands may have died of one of its jobs. So that such a job takes no neighbours
with it, every job of a redelivered bundle runs alone, and a note is stored before each run. The worker that gets the bundle
next sees from the notes which job was running when the worker before it died.

A bundle that a living worker handed back, because it could not run it soon, harmed nobody. That worker's note says so, and
the bundle's jobs are joined as if it came for the first time.
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
"""A bundle that takes this long is noted."""

_ANSWERED = 0
"""As the attempt of a job whose caller has its answer; infer lanes keep no results that would tell."""


class Redelivery:
    """What one model instance does with bundles that come again, or that it hands back."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus = bus
        self._model = model
        self._notes = SignedBucket(bus, "attempts", MessageType.ATTEMPT)

    async def is_suspect(self, bundle: Bundle) -> bool:
        """Whether a worker may have died of this bundle: it came before, and its last holder did not hand it back."""
        if bundle.delivery.attempt == 1:
            return False
        note = await self._stored(bundle.header.message_id)
        harmless = note is not None and note.attempt == 0 and note.deliveries == bundle.delivery.attempt - 1
        if not harmless:
            metrics.REDELIVERED.labels(self._model).inc()
        return not harmless

    async def began(self, bundle: Bundle) -> None:
        """Note that a bundle began that came for the first time, for those who ask for the state of its jobs; one that is over
        at once needs no note."""
        await asyncio.sleep(NOTED_S)
        if not bundle.left or (bundle.leaving and not bundle.running):
            return  # it is over, or was handed back with a note of its own
        bundle.noted = True
        try:
            await self._put(bundle.header.message_id, 1)
        except TetherError as error:
            log.info("not noted that a bundle began: %s", error, extra={"action": "note_lost", "code": error.code})

    async def hand_back(self, bundle: Bundle) -> None:
        """Let another worker have it at once. Without the note, its jobs would run one by one there."""
        if not bundle.suspect:
            try:
                await self._put(bundle.header.message_id, 0, bundle.delivery.attempt)
            except TetherError as error:
                log.info("handed back without a note: %s", error, extra={"action": "note_lost", "code": error.code})
        await bundle.delivery.give_back()

    async def begin(self, bundle: Bundle, job: Job) -> int | Outcome | None:
        """Before a job of a suspect bundle runs: the number of this attempt, which is noted; or its end, when it may not be tried
        again; ``None`` when its caller has its answer."""
        last = await self._last_attempt(job)
        if last == _ANSWERED:
            return None
        if last >= self._bus.settings.max_attempts:
            return await self._dead_letter(bundle, job, last)
        await self._put(job.id, last + 1)
        return last + 1

    async def answered(self, job: Job) -> None:
        """The caller of a job of a suspect infer bundle has its answer: no other worker need run it."""
        await self._put(job.id, _ANSWERED)

    async def over(self, bundle: Bundle) -> None:
        """All jobs of an acknowledged bundle have ended: notes of it are needed no more. One that stays, because the broker did
        not hear, goes with its age."""
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
        """The first try was in the bundle; after that, the last note says it."""
        note = await self._stored(job.id)
        return 1 if note is None else note.attempt

    async def _dead_letter(self, bundle: Bundle, job: Job, attempts: int) -> Outcome:
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
        except (QueueFull, StorageFull) as full:
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
        frame = self._bus.signer.sign_envelope(MessageType.DEAD, subject, codec.pack(letter), message_id=message_id)
        await self._bus.publish_acked(subject, frame, headers={"Nats-Msg-Id": message_id})
