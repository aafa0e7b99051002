"""Ensures that every accepted job has a result, or its bundle is in a lane that delivers it.

A bundle stays in its lane until it is acknowledged, and a worker acknowledges it after the results of its
jobs are stored. So a job whose bundle is in no lane, checked first, and that has no result, checked second,
will never run: its message was lost, in a power cut or by a worker that acknowledged too early. The sweeper
fails it with ``job_lost`` through the results stream, so that a later result is refused.

The cost depends on the jobs open for longer than :data:`GRACE_S`. Every other job costs reading its record's
name and one small message about its result. All records are read, in pages, at the start and after a
reconnection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice

from tether.bus.bus import Bus, Message, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.dispatcher.jobs.open_jobs import OpenJob, OpenRecords, decoded
from tether.dispatcher.lanes.consumer_check import LaneCheck
from tether.dispatcher.lanes.lane_messages import LaneMessages
from tether.domain.job import Failure, JobId, JobRecord, JobState, Lane, LaneKind, Outcome
from tether.errors import BadEncoding, JobLost, PermissionDenied, TetherError
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.streams.job_queue import BusResults
from tether.wire import codec

log = logging.getLogger(__name__)

ROUND_S = 5.0
GRACE_S = 30.0
"""Age of a record in seconds before its job is checked: a gateway tries for 15 s to queue the bundle."""

UNQUEUED_S = 120.0
"""Age in seconds after which the record of a job that was never queued is deleted."""

MOST_LANES = 256
"""Maximum lanes with old jobs to check in one round; the others follow in the next rounds."""

_BATCH = 512


@dataclass
class _Place:
    """A lane with old jobs: their record keys by bundle and job."""

    messages: LaneMessages
    bundles: dict[str, dict[JobId, str]] = field(default_factory=dict)
    looked: int = 0

    def missing(self) -> dict[JobId, str]:
        """Return the jobs whose bundle is not in the lane, with their record keys."""
        gone = [jobs for bundle, jobs in self.bundles.items() if bundle not in self.messages.there]
        return {job: key for jobs in gone for job, key in jobs.items()}


class Sweeper:
    """Finds lost jobs; runs in the dispatcher, in several at once too. Use :func:`sweeping`."""

    def __init__(self, bus: Bus, lanes: LaneCheck) -> None:
        self._bus = bus
        self._lanes = lanes
        self._records = KvBucket(bus, "jobs")
        self._results = BusResults(bus)
        self.open = OpenRecords(bus)
        self._unqueued: dict[JobId, OpenJob] = {}
        """Records of jobs that are not accepted yet."""
        self._places: dict[Lane, _Place] = {}
        self._where: dict[JobId, tuple[Lane, str]] = {}
        """Lane (with the region ``*``) and bundle of every old job."""
        self._number = 0
        self._lost_sight = True

    def reset(self) -> None:
        """Forget what is known of the broker: it may have restarted."""
        self._lost_sight = True

    async def on_result(self, message: Message) -> None:
        """Handle the message that a result was stored."""
        job = JobId(message.subject.rpartition(".")[2])
        self.open.ended(job)
        self._forget(job)

    def _forget(self, job: JobId) -> None:
        self._unqueued.pop(job, None)
        found = self._where.pop(job, None)
        if found is None:
            return
        lane, bundle = found
        place = self._places[lane]
        place.bundles[bundle].pop(job, None)
        if not place.bundles[bundle]:
            del place.bundles[bundle]
        if not place.bundles:
            del self._places[lane]

    async def run(self) -> None:
        """Run a round periodically until cancelled."""
        while True:
            try:
                await self.round()
            except TetherError as error:
                log.info("could not sweep jobs: %s", error, extra={"action": "not_swept", "code": error.code})
            await asyncio.sleep(ROUND_S)

    async def round(self, *, grace_s: float = GRACE_S, unqueued_s: float = UNQUEUED_S) -> None:
        """Check all old jobs once, and fail those that are lost.

        Raises:
            JetStreamError, BrokerUnavailable: the round is incomplete.
        """
        self._number += 1
        if self._lost_sight:
            self._lost_sight = False
            self.open.reset()
            self._unqueued.clear()
            self._places.clear()
            self._where.clear()
        await self.open.read()
        await self._place(grace_s)
        await self._remove_unqueued(unqueued_s)
        await self._check()
        metrics.JOBS_OPEN.set(len(self.open) + len(self._where))

    # assign old jobs to their lanes

    async def _place(self, grace_s: float) -> None:
        while entries := list(islice(self.open.older_than(grace_s), _BATCH)):
            stored = await self._read([entry.key for entry in entries])
            records = {key: record for key, item in stored.items() if (record := decoded(item.data)) is not None}
            ended = await self._ended_if_known(records.values())
            for entry in entries:
                record = records.get(entry.key)
                if not self.open.take(entry.job) or record is None or record.id != entry.job or record.id in ended:
                    continue
                if record.bundle:
                    self._put(entry.key, record)
                else:
                    self._unqueued[entry.job] = entry

    async def _read(self, keys: Iterable[str]) -> dict[str, StoredMessage]:
        subjects = {self._records.subject(key): key for key in keys}
        stored = await self._bus.direct_batch(self._records.stream, list(subjects))
        return {subjects[subject]: item for subject, item in stored.items() if item.data}

    async def _ended(self, records: Iterable[JobRecord]) -> set[str]:
        found: set[str] = set()
        for pool, jobs in _by_pool(records).items():
            found.update(await self._results.find(jobs, pool=pool))
        return found

    async def _ended_if_known(self, records: Iterable[JobRecord]) -> set[str]:
        """Return ids of finished jobs; a pool whose results cannot be read is skipped and asked again later."""
        found: set[str] = set()
        for pool, jobs in _by_pool(records).items():
            try:
                found.update(await self._results.find(jobs, pool=pool))
            except TetherError as error:
                log.info("could not read results: %s", error, extra={"action": "not_swept", "code": error.code})
        return found

    def _put(self, key: str, record: JobRecord) -> None:
        lane = Lane(LaneKind.JOB, record.model, record.version, "*", record.pool, record.priority)
        place = self._places.get(lane)
        if place is None:
            place = self._places[lane] = _Place(LaneMessages(self._bus, lane))
        place.bundles.setdefault(record.bundle, {})[record.id] = key
        self._where[record.id] = lane, record.bundle

    # compare lanes with them

    async def _check(self) -> None:
        places = sorted(self._places.items(), key=lambda item: item[1].looked)
        for lane, place in places[:MOST_LANES]:
            place.looked = self._number
            try:
                await self._check_lane(lane, place)
            except TetherError as error:
                # a stream that does not answer delays no other lane
                log.info("could not sweep a lane: %s", error, extra={"action": "not_swept", "code": error.code})

    async def _check_lane(self, lane: Lane, place: _Place) -> None:
        for skipped in await place.messages.update():
            await self._lanes.recreate(skipped, "stuck", "it had skipped messages of old jobs")
        if await self._without_result(place.missing()):
            # re-read the whole lane before failing any job: the remembered state may be wrong
            place.messages = LaneMessages(self._bus, lane)
            await place.messages.update()
            for record in await self._without_result(place.missing()):
                await self._end(record)
                self._forget(record.id)

    async def _without_result(self, jobs: Mapping[JobId, str]) -> list[JobRecord]:
        """Return the verified records of jobs without a result; forget the others."""
        found: list[JobRecord] = []
        names = list(jobs)
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            stored = await self._read([jobs[job] for job in part])
            opened = [self._verified(item) for item in stored.values()]
            records = {record.id: record for record in opened if record is not None}
            ended = await self._ended(records.values())
            now = self._bus.clock.utc()
            for job in part:
                if job in records and job not in ended and records[job].deadline > now:
                    found.append(records[job])
                else:
                    self._forget(job)
        return found

    def _verified(self, item: StoredMessage) -> JobRecord | None:
        envelope = self._bus.verify_frame(item.data, item.subject, MessageType.RECORD)
        try:
            return None if envelope is None else codec.decode_record(envelope.body)
        except BadEncoding:
            return None

    async def _end(self, record: JobRecord) -> None:
        if not self._may_end():
            log.error(
                "job %s is lost, and the keyset does not let '%s' fail it: run 'tether init' with the root key",
                record.id,
                self._bus.signer.name,
                extra={"action": "job_lost", "job_id": record.id},
            )
            return
        job, now = record.id, self._bus.clock.utc()
        error = JobLost(
            "the broker lost the job before it finished, as in a power cut; submit it again with another key"
        )
        failure = Failure(error.code, error.message)
        outcome = Outcome(job, JobState.FAILED, (), failure, 0, self._bus.signer.name, 0.0, now)
        subject = self._bus.names.result(job, record.pool)
        frame = self._bus.signer.sign_envelope(
            MessageType.RESULT, subject, codec.encode_outcomes([outcome]), jobs=(job,)
        )
        if await self._results.commit(job, frame, pool=record.pool):
            metrics.JOBS_SWEPT.labels("lost").inc()
            metrics.JOBS_FINISHED.labels(record.model, outcome.state.value).inc()
            extra = {"action": "job_lost", "job_id": job, "tenant": record.tenant, "model": record.model}
            log.error("failed job %s: it is in no lane and has no result", job, extra=extra)

    def _may_end(self) -> bool:
        """Return True if the keyset lets this dispatcher store outcomes; an old one does not."""
        identities = self._bus.verifier.keyset.identities
        return any(item.kid == self._bus.signer.kid and MessageType.RESULT in item.types for item in identities)

    # records of jobs that were never queued

    async def _remove_unqueued(self, age_s: float) -> None:
        """Delete records of jobs that were never queued; a client that retries its key makes a new record."""
        limit = self._bus.clock.monotonic() - age_s
        for entry in [entry for entry in self._unqueued.values() if entry.since <= limit]:
            del self._unqueued[entry.job]
            item = (await self._read([entry.key])).get(entry.key)
            record = None if item is None else decoded(item.data)
            if item is None or record is None or record.id != entry.job or record.bundle:
                continue
            await self._records.remove(entry.key, item.sequence)
            metrics.JOBS_SWEPT.labels("unqueued").inc()
            log.info("deleted the record of a job that was never queued", extra={"action": "record_removed"})


def _by_pool(records: Iterable[JobRecord]) -> dict[str, list[JobId]]:
    found: dict[str, list[JobId]] = {}
    for record in records:
        found.setdefault(record.pool, []).append(record.id)
    return found


@asynccontextmanager
async def sweeping(bus: Bus, lanes: LaneCheck, tasks: Tasks) -> AsyncIterator[Sweeper]:
    """Run a sweeper until the block ends; none if an older broker configuration does not permit it."""
    sweeper = Sweeper(bus, lanes)
    try:
        subscription = await bus.subscribe(bus.names.every_end(), sweeper.on_result)
    except PermissionDenied as error:
        log.error("not looking for lost jobs: %s; write the broker's configuration again", error)  # noqa: TRY400 - it says it all
        yield sweeper
        return
    forget = bus.on_reconnect(sweeper.reset)
    tasks.spawn(sweeper.run(), "sweep")
    try:
        yield sweeper
    finally:
        forget()
        await subscription.unsubscribe()
