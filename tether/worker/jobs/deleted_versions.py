"""Drains the lanes of deleted versions: fails every job in them with the reason."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.keyrings import Keyring
from tether.domain.job import Failure, Job, JobState, LaneKind, Outcome
from tether.domain.worker_protocol import EndedLanes
from tether.errors import DeadlineExceeded, ModelNotFound, TetherError
from tether.process.lifecycle import Tasks
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.streams.layout import lanes_of
from tether.worker.jobs.ack_keepalive import KeepAlive
from tether.worker.jobs.bundle_reader import BundleReader
from tether.worker.scheduling.bundle import Bundle

log = logging.getLogger(__name__)

_AGAIN_S = 1.0


class DeletedVersionDrain:
    """Drains the lanes that the dispatcher lists; changes of one version are made in order."""

    def __init__(self, bus: Bus, keepalive: KeepAlive, keyring: Keyring) -> None:
        self._bus = bus
        self._keepalive = keepalive
        self._keyring = keyring
        self._models = KvBucket(bus, "models")
        self._wanted: frozenset[EndedLanes] = frozenset()
        self._working: dict[EndedLanes, asyncio.Event] = {}
        self._tasks = Tasks()
        self._stopping = False

    def want(self, lanes: Sequence[EndedLanes]) -> None:
        self._wanted = frozenset(() if self._stopping else lanes)
        for ended in self._wanted - self._working.keys():
            self._working[ended] = asyncio.Event()
            self._tasks.spawn(self._work_off(ended, self._working[ended]), f"ended-{ended.model}")
        for ended in self._working.keys() - self._wanted:
            self._working[ended].set()

    async def stop(self) -> None:
        self._stopping = True
        self.want(())
        await self._tasks.cancel()

    async def _work_off(self, ended: EndedLanes, enough: asyncio.Event) -> None:
        lanes = DeletedLaneDrain(self._bus, ended, self._keepalive, self._keyring)
        try:
            if await self._confirmed(ended, enough):
                await lanes.start()
                await enough.wait()
        finally:
            await lanes.stop()
            del self._working[ended]
            if ended in self._wanted:
                self.want(tuple(self._wanted))

    async def _confirmed(self, ended: EndedLanes, enough: asyncio.Event) -> bool:
        """Return True if the version's own entry says deleted; the dispatcher's list may be wrong."""
        key = self._bus.names.version_key(ended.model, ended.version)
        while not enough.is_set():
            try:
                if await self._models.was_deleted(key):
                    return True
            except TetherError as error:
                log.info("could not confirm a deletion yet, retrying: %s", error, extra={"action": "ended_unconfirmed"})
            await asyncio.sleep(_AGAIN_S)
        return False


class DeletedLaneDrain:
    """Pulls the lanes of one deleted version in one region and fails their jobs."""

    def __init__(self, bus: Bus, ended: EndedLanes, keepalive: KeepAlive, keyring: Keyring) -> None:
        self._bus = bus
        self._ended = ended
        self._keepalive = keepalive
        self._intake = BundleReader(bus, keyring, ended.model)
        self._tasks = Tasks()
        lanes = lanes_of(ended.model, ended.version, ended.region, bus.pool)
        self._pulls = {lane: LaneConsumer(bus, lane, bus.settings.worker_prefetch, self._take) for lane in lanes}

    async def start(self) -> None:
        for pull in self._pulls.values():
            await pull.start()

    async def stop(self) -> None:
        await asyncio.gather(*[pull.stop() for pull in self._pulls.values()], return_exceptions=True)
        await self._tasks.finish(self._bus.settings.shutdown_timeout_s)
        await self._tasks.cancel()

    def _take(self, delivery: Delivery) -> None:
        settings = self._bus.settings
        infer = delivery.lane.kind is LaneKind.INFER
        wait = settings.infer_ack_wait_s if infer else settings.jobs_ack_wait_s
        self._keepalive.hold(delivery.ack_subject, wait, self._bus.clock.monotonic())
        delivery.on_settled = self._settled
        self._tasks.spawn(self._end(delivery), "end")

    def _settled(self, delivery: Delivery) -> None:
        self._keepalive.drop(delivery.ack_subject)
        self._pulls[delivery.lane].release()

    async def _end(self, delivery: Delivery) -> None:
        try:
            bundle = await self._intake.read(delivery)
            if bundle is not None:
                await self._intake.deliver([bundle], [self._outcome(bundle, job) for job in bundle.jobs])
                await delivery.ack()
        except TetherError as error:
            log.warning(
                "left a bundle for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code}
            )
        finally:
            delivery.abandon()

    def _outcome(self, bundle: Bundle, job: Job) -> Outcome:
        now, worker = self._bus.clock.utc(), self._bus.signer.name
        attempts = bundle.delivery.attempt - 1
        if job.deadline <= now:
            late = Failure(DeadlineExceeded.code, "the deadline passed before the job could run")
            return Outcome(job.id, JobState.EXPIRED, (), late, attempts, worker, 0.0, now)
        ended = self._ended
        failure = Failure(
            ModelNotFound.code, f"version {ended.version} of model '{ended.model}' was deleted while the job waited"
        )
        return Outcome(job.id, JobState.FAILED, (), failure, attempts, worker, 0.0, now)
