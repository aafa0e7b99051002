"""One model version in a worker: its lanes, its runs, its answers.

The way of a bundle stands in :meth:`ModelInstance._work`: verify, drop what is over, run, answer, acknowledge. A
bundle that was delivered before goes through :mod:`tether.worker.redelivery` instead, one job at a time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tether import codec, metrics
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.bus.pull import BusDelivery, LanePull
from tether.bus.queue import BusResults
from tether.bus.tenant_keys import Keyring
from tether.bus.topology import lanes_of
from tether.envelope import MessageType
from tether.errors import DeadlineExceeded, TetherError
from tether.job import AttemptNote, Failure, Job, JobState, Lane, LaneKind, Outcome, Priority
from tether.lifecycle import Tasks
from tether.model import Manifest
from tether.model_config import LoadBalancing
from tether.worker import balance, batching
from tether.worker.copies import Copies
from tether.worker.intake import Bundle, Intake
from tether.worker.keepalive import KeepAlive
from tether.worker.loadout import Serving
from tether.worker.redelivery import Redelivery

log = logging.getLogger(__name__)

_ORDER = {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}


class _Ended(NamedTuple):
    """The end of a job, and the times (UTC seconds) of the run that ended it."""

    result: batching.Result
    started: float
    finished: float


class Hearing(NamedTuple):
    """Who hears what only the runs of a version show."""

    lost: Callable[[Exception], None]
    """It cannot be loaded any more."""
    mixed: Callable[[str], None]
    """It does not keep rows apart."""


class ModelInstance:
    """Serves one version from its lanes until it is stopped."""

    def __init__(
        self,
        bus: Bus,
        manifest: Manifest,
        copies: Copies,
        keepalive: KeepAlive,
        keyring: Keyring,
        *,
        hearing: Hearing,
    ) -> None:
        self._bus = bus
        self._settings = bus.settings
        self.manifest = manifest
        self.copies = copies
        self._hearing = hearing
        self._keepalive = keepalive
        self.intake = Intake(bus, keyring, manifest.name)
        self._results = BusResults(bus)
        self._attempts = SignedBucket(bus, "attempts", MessageType.ATTEMPT)
        self._redelivery = Redelivery(bus, self)
        self._waiting: list[tuple[int, int, BusDelivery]] = []
        self._order = itertools.count()
        self._arrived = asyncio.Event()
        self._tasks = Tasks()
        self._serving = Serving(manifest.batching, (), 0.0, 0.0, LoadBalancing.LEAST_CONNECTIONS)
        self._capacity = balance.Capacity()
        self._side_by_side = 2
        """Works that may have begun: one for each copy, and one that is made ready."""
        self._begun = 0
        self._ended_one = asyncio.Event()
        self._pulls = [
            LanePull(bus, lane, self._settings.worker_slots, self._take)
            for lane in lanes_of(manifest.name, manifest.version, self._settings.region, bus.scope)
        ]
        self._by_lane = {pull.lane: pull for pull in self._pulls}
        self.running = 0

    def configure(self, serving: Serving, copies: int) -> None:
        """What counts from the next run on; ``copies`` is how many runs are made side by side."""
        self._serving = serving
        self.copies.limit(serving.run_timeout_s)
        self._side_by_side = copies + 1
        self._ended_one.set()
        self._share()

    def _share(self) -> None:
        """Ask every lane as the strategy that counts says."""
        turns = balance.turns(self._serving.strategy, self._settings.worker_weight, self._capacity)
        for pull in self._pulls:
            pull.share(max(self._settings.worker_slots, self._side_by_side), turns)

    def weigh(self, factor: float, least: float) -> float:
        """Ask as follows from how much of the machine there is, see :meth:`balance.Capacity.look`; the level, 0 when it is not
        known, or when jobs are not shared by it."""
        if self._serving.strategy is not LoadBalancing.CAPACITY:
            return 0.0
        before = self._capacity.turns
        self._capacity.look(factor, self._side_by_side - 1, least)
        if self._capacity.turns != before:
            fields = {"action": "turns_changed", "model": self.manifest.name, "version": self.manifest.version}
            log.info("%d turns by capacity, before %d", self._capacity.turns, before, extra=fields)
            self._share()
        return self._capacity.level

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
        serving = self._tasks.named("serve-")
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        if not await self._tasks.finish(drain_s):
            log.warning("runs did not end in time; their jobs are redelivered", extra={"action": "drain_timeout"})
        await self._tasks.cancel()
        generation = self.copies.take_out()
        if generation is not None:
            generation.close()

    def _take(self, delivery: BusDelivery) -> None:
        wait = self._ack_wait(delivery.lane)
        self._keepalive.hold(delivery.ack_subject, wait, self._bus.clock.monotonic())
        delivery.on_settled = self._settled
        heapq.heappush(self._waiting, (self._rank(delivery.lane), next(self._order), delivery))
        self._arrived.set()

    def _rank(self, lane: Lane) -> int:
        return 0 if lane.kind is LaneKind.INFER else _ORDER[lane.priority]

    def _ack_wait(self, lane: Lane) -> float:
        return self._settings.infer_ack_wait_s if lane.kind is LaneKind.INFER else self._settings.jobs_ack_wait_s

    def _settled(self, delivery: BusDelivery) -> None:
        self._keepalive.drop(delivery.ack_subject)
        self._by_lane[delivery.lane].release()

    async def _serve(self) -> None:
        """Begin the next bundles whenever there is room: each copy runs one, and one is made ready."""
        while True:
            await self._arrived.wait()
            while self._begun >= self._side_by_side:
                self._ended_one.clear()
                await self._ended_one.wait()
            deliveries = self._next()
            if not deliveries:
                self._arrived.clear()
                continue
            opened: list[Bundle] | None = None
            self._begun += 1
            try:
                if self._serving.delay_s and deliveries[0].attempt == 1:
                    opened = []
                    await self._with_company(deliveries, opened)
            except TetherError as error:
                log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
            finally:
                self._tasks.spawn(self._finish(deliveries, opened), "work")

    async def _with_company(self, deliveries: list[BusDelivery], opened: list[Bundle]) -> None:
        """Open them, and what comes until a run is full enough, the delay is up, or something more urgent waits; both lists
        grow with it."""
        most, preferred, rank = (
            self._serving.batching.max_batch_size,
            self._serving.preferred,
            self._rank(deliveries[0].lane),
        )
        end = self._bus.clock.monotonic() + self._serving.delay_s
        joined = list(deliveries)
        while True:
            for delivery in joined:
                opened += await self._opened([delivery])
            urgent = self._waiting and self._waiting[0][0] < rank
            if urgent or not batching.wants_company([job for one in opened for job in one.jobs], most, preferred):
                break
            joined = self._joining(rank)
            deliveries += joined
            if not joined and not await self._more(end):
                break
        self._arrived.set()

    async def _more(self, end: float) -> bool:
        """Whether something arrived before the monotonic time ``end``."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(end - self._bus.clock.monotonic()):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    async def _opened(self, deliveries: Sequence[BusDelivery]) -> list[Bundle]:
        return [bundle for delivery in deliveries if (bundle := await self.intake.open(delivery)) is not None]

    def _next(self) -> list[BusDelivery]:
        """The most urgent delivery and those of its kind that can join it; a redelivered one goes alone."""
        if not self._waiting:
            return []
        rank, _, first = heapq.heappop(self._waiting)
        return [first] if first.attempt > 1 else [first, *self._joining(rank)]

    def _joining(self, rank: int) -> list[BusDelivery]:
        taken = []
        while self._waiting and self._waiting[0][0] == rank and self._waiting[0][2].attempt == 1:
            taken.append(heapq.heappop(self._waiting)[2])
        return taken

    async def _finish(self, deliveries: list[BusDelivery], bundles: list[Bundle] | None) -> None:
        try:
            async with self.copies.held():
                if await self._loaded():
                    await self._work(await self._opened(deliveries) if bundles is None else bundles)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            self._begun -= 1
            self._ended_one.set()
            for delivery in deliveries:
                delivery.abandon()

    async def wake(self) -> None:
        """Load what is not in memory, before a job comes."""
        async with self.copies.held():
            await self._loaded()

    async def _loaded(self) -> bool:
        """Whether it is in memory now; if it cannot be loaded, what came is left for another worker, or a better time."""
        try:
            await self.copies.ensure()
        except Exception as error:  # noqa: BLE001 - handed on to who tells of it
            self._hearing.lost(error)
            return False
        return True

    async def _work(self, bundles: list[Bundle]) -> None:
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
            for job, ended in zip(alive, await self._run_all(alive), strict=True):
                by_id[job.id] = self._outcome(job, ended, attempt)
        finally:
            self.running -= len(alive)
        return [by_id[job.id] for job in jobs]

    async def _run_all(self, jobs: Sequence[Job]) -> list[_Ended]:
        """Run jobs as they can be joined and cut; once a run shows that rows are not kept apart, each whole and alone."""
        runs = batching.plan(jobs, self._serving.batching)
        gathered, ended = batching.Gathered(runs), dict[int, _Ended]()
        for wanted, (done, started, finished) in zip(runs, await asyncio.gather(*map(self._run, runs)), strict=True):
            for index, result in gathered.add(wanted, done).items():
                if result is not None:
                    ended[index] = _Ended(result, started, finished)
        if gathered.mixed:
            self._hearing.mixed(gathered.mixed)
            again = [index for index in range(len(jobs)) if index not in ended or index in gathered.joined]
            alone = batching.plan([jobs[index] for index in again], batching.ALONE)
            for index, (done, started, finished) in zip(
                again, await asyncio.gather(*map(self._run, alone)), strict=True
            ):
                (result,) = done.results
                assert result is not None  # noqa: S101 - only pieces of joined runs have none
                ended[index] = _Ended(result, started, finished)
        return [ended[index] for index in range(len(jobs))]

    async def _run(self, wanted: batching.Run) -> tuple[batching.Done, float, float]:
        """How a run ended, and the times (UTC seconds) when it began and ended."""
        ran = await self.copies.run(wanted)
        self._capacity.ran(ran.seconds, wanted.jobs)
        metrics.BATCH_ROWS.labels(self.manifest.name).observe(wanted.rows)
        metrics.RUN_SECONDS.labels(self.manifest.name).observe(ran.seconds)
        finished = self._bus.clock.utc()
        return ran.done, finished - ran.seconds, finished

    def _outcome(self, job: Job, ended: _Ended, attempt: int) -> Outcome:
        worker, (result, started, finished) = self._bus.signer.name, ended
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
