"""One model version in a worker: its lanes, its runs, its answers.

The way of a bundle stands in :meth:`ModelInstance._work`: verify, drop what is over, run, answer, acknowledge. A
bundle that was delivered before goes through :mod:`tether.worker.redelivery` instead, one job at a time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.bus.pull import BusDelivery, LanePull
from tether.bus.queue import BusResults
from tether.bus.tenant_keys import Keyring
from tether.bus.topology import lanes_of
from tether.envelope import MessageType
from tether.errors import (
    DeadlineExceeded,
    TetherError,
)
from tether.job import AttemptNote, Failure, Job, JobState, Lane, LaneKind, Outcome, Priority
from tether.lifecycle import Tasks
from tether.model import Manifest
from tether.ports import Runtime
from tether.worker import batching
from tether.worker.intake import Bundle, Intake
from tether.worker.keepalive import KeepAlive
from tether.worker.redelivery import Redelivery

log = logging.getLogger(__name__)

_ORDER = {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}


class ModelInstance:
    """Serves one loaded version from its lanes until it is stopped."""

    def __init__(self, bus: Bus, manifest: Manifest, runtime: Runtime, keepalive: KeepAlive, keyring: Keyring) -> None:
        self._bus = bus
        self._settings = bus.settings
        self.manifest = manifest
        self._runtime = runtime
        self._keepalive = keepalive
        self.intake = Intake(bus, keyring, manifest.name)
        self._results = BusResults(bus)
        self._attempts = SignedBucket(bus, "attempts", MessageType.ATTEMPT)
        self._redelivery = Redelivery(bus, self)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"run-{manifest.name}")
        self._waiting: list[tuple[int, int, BusDelivery]] = []
        self._order = itertools.count()
        self._arrived = asyncio.Event()
        self._tasks = Tasks()
        self._run_slots = asyncio.Semaphore(2)
        self._pulls = [
            LanePull(bus, lane, self._settings.worker_slots, self._take)
            for lane in lanes_of(manifest.name, manifest.version, self._settings.region, bus.scope)
        ]
        self._by_lane = {pull.lane: pull for pull in self._pulls}
        self.running = 0

    async def start(self) -> None:
        self._tasks.spawn(self._serve(), f"serve-{self.manifest.name}")
        for pull in self._pulls:
            await pull.start()

    async def stop(self, drain_s: float) -> None:
        """Ask for no more, give back what has not begun, finish what has, free the model."""
        for ended in await asyncio.gather(*[pull.stop() for pull in self._pulls], return_exceptions=True):
            if isinstance(ended, Exception):
                log.info("a pull did not end in order: %s", ended, extra={"action": "pull_not_drained"})
        waiting, self._waiting = self._waiting, []
        for _, _, delivery in waiting:
            await delivery.give_back()
        for task in self._tasks.named("serve-"):
            task.cancel()
        if not await self._tasks.finish(drain_s):
            log.warning("runs did not end in time; their jobs are redelivered", extra={"action": "drain_timeout"})
        await self._tasks.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._runtime.close()

    def _take(self, delivery: BusDelivery) -> None:
        wait = self._ack_wait(delivery.lane)
        self._keepalive.hold(delivery.ack_subject, wait, self._bus.clock.monotonic())
        delivery.on_settled = self._settled
        rank = 0 if delivery.lane.kind is LaneKind.INFER else _ORDER[delivery.lane.priority]
        heapq.heappush(self._waiting, (rank, next(self._order), delivery))
        self._arrived.set()

    def _ack_wait(self, lane: Lane) -> float:
        return self._settings.infer_ack_wait_s if lane.kind is LaneKind.INFER else self._settings.jobs_ack_wait_s

    def _settled(self, delivery: BusDelivery) -> None:
        self._keepalive.drop(delivery.ack_subject)
        self._by_lane[delivery.lane].release()

    async def _serve(self) -> None:
        """Begin the next bundles whenever one of the two run slots is free: one runs, one is made ready."""
        while True:
            await self._arrived.wait()
            await self._run_slots.acquire()
            deliveries = self._next()
            if not deliveries:
                self._run_slots.release()
                self._arrived.clear()
                continue
            self._tasks.spawn(self._finish(deliveries), "work")

    def _next(self) -> list[BusDelivery]:
        """The most urgent delivery and those of its kind that can join it; a redelivered one goes alone."""
        if not self._waiting:
            return []
        rank, _, first = heapq.heappop(self._waiting)
        taken = [first]
        while first.attempt == 1 and self._waiting and self._waiting[0][0] == rank and self._waiting[0][2].attempt == 1:
            taken.append(heapq.heappop(self._waiting)[2])
        return taken

    async def _finish(self, deliveries: list[BusDelivery]) -> None:
        try:
            await self._work(deliveries)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            self._run_slots.release()
            for delivery in deliveries:
                delivery.abandon()

    async def _work(self, deliveries: list[BusDelivery]) -> None:
        bundles = [bundle for delivery in deliveries if (bundle := await self.intake.open(delivery)) is not None]
        if not bundles:
            return
        if bundles[0].delivery.attempt > 1:
            metrics.REDELIVERED.labels(self.manifest.name).inc()
            await self._redelivery.work(bundles[0])
            return
        durable = bundles[0].delivery.lane.kind is LaneKind.JOB
        ended = await self._ended(bundles) if durable else frozenset()
        jobs = [job for bundle in bundles for job in bundle.jobs if job.id not in ended]
        outcomes = await self.run(jobs, attempt=1)
        await self.deliver(bundles, outcomes)
        for bundle in bundles:
            await bundle.delivery.ack()

    async def _ended(self, bundles: Sequence[Bundle]) -> frozenset[str]:
        """Jobs that need no run: cancelled while they waited. Notes at the same time that the rest begin."""
        ids = [job.id for bundle in bundles for job in bundle.jobs]
        note = AttemptNote(1, self._bus.signer.name, self._bus.clock.utc())
        scope, key = self._bus.scope, self._bus.names.attempt_key
        notes = [self._attempts.put(key(bundle.header.message_id, scope), codec.encode(note)) for bundle in bundles]
        found, _ = await asyncio.gather(self._results.find(ids, scope=scope), asyncio.gather(*notes))
        return frozenset(found)

    async def run(self, jobs: Sequence[Job], attempt: int) -> list[Outcome]:
        """Run jobs in as few runs as their shapes allow; one outcome each, in order."""
        now = self._bus.clock.utc()
        alive = [job for job in jobs if job.deadline > now]
        by_id = {job.id: self._expired(job, attempt) for job in jobs if job.deadline <= now}
        self.running += len(alive)
        try:
            for members in batching.plan(alive, self.manifest.batching):
                for outcome in await self._run_batch([alive[index] for index in members], attempt):
                    by_id[outcome.job] = outcome
        finally:
            self.running -= len(alive)
        return [by_id[job.id] for job in jobs]

    async def _run_batch(self, jobs: list[Job], attempt: int) -> list[Outcome]:
        started, began = self._bus.clock.utc(), self._bus.clock.monotonic()
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._executor, batching.run, self._runtime, jobs)
        metrics.BATCH_ROWS.labels(self.manifest.name).observe(len(jobs))
        metrics.RUN_SECONDS.labels(self.manifest.name).observe(self._bus.clock.monotonic() - began)
        finished = self._bus.clock.utc()
        return [
            self._outcome(job, result, attempt, started, finished) for job, result in zip(jobs, results, strict=True)
        ]

    def _outcome(self, job: Job, result: batching.Result, attempt: int, started: float, finished: float) -> Outcome:
        worker = self._bus.signer.name
        if isinstance(result, TetherError):
            ids = {"job_id": job.id, "request_id": job.request_id, "tenant": job.tenant, "model": self.manifest.name}
            log.info("a job failed: %s", result, extra={"action": "job_failed", "code": result.code, **ids})
            failure = Failure(result.code, result.message)
            return Outcome(job.id, JobState.FAILED, (), failure, attempt, worker, started, finished)
        return Outcome(job.id, JobState.SUCCEEDED, result, None, attempt, worker, started, finished)

    def _expired(self, job: Job, attempt: int) -> Outcome:
        failure = Failure(DeadlineExceeded.code, "the deadline passed before the job could run")
        return Outcome(
            job.id, JobState.EXPIRED, (), failure, attempt - 1, self._bus.signer.name, 0.0, self._bus.clock.utc()
        )

    async def deliver(self, bundles: Sequence[Bundle], outcomes: Sequence[Outcome]) -> None:
        await self.intake.deliver(bundles, outcomes)
