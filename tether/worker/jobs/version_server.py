"""Serves one model version in a worker: pulls its lanes, runs its jobs, delivers their outcomes.

A bundle is verified and decoded on arrival, and its jobs join the version's queue. Each free instance takes
the next run from there (:mod:`tether.worker.scheduling.job_turns`). Outcomes are delivered when their run
finishes. A bundle is acknowledged when all of its jobs have finished. Jobs of a redelivered bundle run alone,
see :mod:`tether.worker.jobs.redelivery`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import Keyring
from tether.domain.job import LaneKind
from tether.domain.manifest import Manifest, gives_optional
from tether.errors import TetherError
from tether.model.config import LoadBalancing
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.streams.job_queue import BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.streams.layout import lanes_of
from tether.worker.jobs.ack_keepalive import KeepAlive
from tether.worker.jobs.bundle_reader import BundleReader
from tether.worker.jobs.commit_slots import CommitSlots
from tether.worker.jobs.lane_pulls import LanePulls
from tether.worker.jobs.redelivery import Redelivery
from tether.worker.jobs.withdrawn_jobs import WithdrawnJobs
from tether.worker.models.load_spec import RunSpec
from tether.worker.runs.active_runs import ActiveRuns
from tether.worker.runs.isolated_instance import IsolatedInstance
from tether.worker.runs.job_runs import End, RunListeners, Runs
from tether.worker.scheduling.bundle import Bundle
from tether.worker.scheduling.job_turns import JobTicket, NextRun, RunQueue, bundles_of, level_of
from tether.worker.scheduling.pull_pace import AHEAD_S

log = logging.getLogger(__name__)

_LAST_S = 2.0
"""Seconds that a stopping version has to hand back its pending bundles."""


class VersionServer:
    """Serves one version from its lanes until it is stopped."""

    def __init__(
        self,
        bus: Bus,
        manifest: Manifest,
        apart: IsolatedInstance,
        keepalive: KeepAlive,
        keyring: Keyring,
        *,
        hearing: RunListeners,
    ) -> None:
        self._bus = bus
        self._settings = bus.settings
        self.manifest = manifest
        self._apart, self.copies = apart, apart.copies
        self._hearing = hearing
        self._keepalive = keepalive
        self.intake = BundleReader(bus, keyring, manifest.name)
        self._results = BusResults(bus)
        self.runs = Runs(bus.signer.name, bus.clock, manifest.name, apart, hearing, room=bus.room)
        self.redelivery = Redelivery(bus, manifest.name)
        self._tasks = Tasks()
        self._serving = RunSpec(manifest.batching, (), 0.0, 0.0, LoadBalancing.LEAST_CONNECTIONS)
        self._pulls = [
            LaneConsumer(bus, lane, 1, self._take)
            for lane in lanes_of(manifest.name, manifest.version, self._settings.region, bus.pool)
        ]
        self._withdrawn = WithdrawnJobs(bus, self._pulls[0].lane)
        self._under_way = ActiveRuns(bus.clock, self._withdrawn)
        self._withdrawn.changed = self._under_way.look
        self._by_lane = {pull.lane: pull for pull in self._pulls}
        self.queue = RunQueue(self._settings.priority_patience_s, bus.clock.monotonic())
        slots, weight = self._settings.worker_prefetch, self._settings.worker_weight
        self._asking = LanePulls(self._pulls, self.queue, self.runs, bus.clock, slots=slots, weight=weight)
        self._bundles: dict[Bundle, None] = {}
        """Pending bundles in order of arrival, until they are settled or handed back."""
        self._waiting: set[str] = set()
        """Ack subjects of deliveries that take one of their lane's pulls: none of their jobs has begun."""
        self._changed = asyncio.Event()
        self._ending = CommitSlots(self._ends_changed)
        self._holding = asyncio.Event()
        self._stopping = False

    @property
    def running(self) -> int:
        """Return the number of jobs that run now."""
        return self.runs.running

    def configure(self, serving: RunSpec, copies: int) -> None:
        """Set the run limits and the number of concurrent runs, ``copies``, from the next run on."""
        self._serving = serving
        self.copies.limit(serving.run_timeout_s)
        self._asking.configure(serving.strategy, copies)
        self._changed.set()

    def update_capacity(self, factor: float, least: float) -> float:
        """Update open pulls by capacity (:meth:`.Capacity.look`); return the level, 0 if unknown or not used."""
        if self._serving.strategy is not LoadBalancing.CAPACITY:
            return 0.0
        capacity = self.runs.capacity
        before = capacity.turns
        capacity.look(factor, self._asking.copies, least)
        if capacity.turns != before:
            fields = {"action": "turns_changed", "model": self.manifest.name, "version": self.manifest.version}
            log.info("changed open pulls by capacity to %d from %d", capacity.turns, before, extra=fields)
            self._asking.share()
        return capacity.level

    async def start(self) -> None:
        self._tasks.spawn(self._serve(), f"serve-{self.manifest.name}")
        self._tasks.spawn(self._watch(), f"serve-watch-{self.manifest.name}")
        await self._withdrawn.start()
        for pull in self._pulls:
            await pull.start()

    async def stop(self, shutdown_timeout_s: float) -> None:
        """Stop pulling, hand back durable and pending bundles, finish synchronous jobs, free the model."""
        for ended in await asyncio.gather(*[pull.stop() for pull in self._pulls], return_exceptions=True):
            if isinstance(ended, Exception):
                log.info("stopped a pull with an error: %s", ended, extra={"action": "pull_not_drained"})
        self._stopping = True
        gathered = bundles_of(self._asking.gathering)
        for bundle in list(self._bundles):
            if bundle not in gathered and (bundle.durable or not bundle.begun):
                self._leave(bundle)
        self._asking.arrived.set()
        try:
            async with asyncio.timeout(shutdown_timeout_s):
                while self._bundles or self._tasks.named("open"):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.warning(
                "runs did not finish in time; jobs are redelivered",
                extra={"action": "drain_timeout"},
            )
        self._under_way.end()
        serving = self._tasks.named("serve-")
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await self._tasks.finish(_LAST_S)
        await self._tasks.cancel()
        self._apart.close()
        await self._withdrawn.stop()
        generation = self.copies.detach()
        if generation is not None:
            generation.close()

    # messages

    def _take(self, delivery: Delivery) -> None:
        infer = delivery.lane.kind is LaneKind.INFER
        wait = self._settings.infer_ack_wait_s if infer else self._settings.jobs_ack_wait_s
        self._keepalive.hold(delivery.ack_subject, wait, self._bus.clock.monotonic())
        self._waiting.add(delivery.ack_subject)
        delivery.on_settled = self._settled
        self._asking.came(level_of(delivery.lane))
        self._tasks.spawn(self._open(delivery), "open")

    def _settled(self, delivery: Delivery) -> None:
        self._keepalive.drop(delivery.ack_subject)
        self._release(delivery)

    def _release(self, delivery: Delivery) -> None:
        if delivery.ack_subject in self._waiting:
            self._waiting.discard(delivery.ack_subject)
            self._by_lane[delivery.lane].release()

    async def _open(self, delivery: Delivery) -> None:
        queued = False
        try:
            bundle = await self.intake.read(delivery)
            queued = bundle is not None and await self._queued(bundle)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            if not queued:
                delivery.abandon()
            self._asking.opened(level_of(delivery.lane))
            self._changed.set()

    async def _queued(self, bundle: Bundle) -> bool:
        """Queue the unfinished jobs of a bundle. Return False if the bundle is settled already."""
        bundle.suspect = await self.redelivery.is_suspect(bundle)
        ids = [job.id for job in bundle.jobs]
        ended = await self._ended(bundle, ids)
        jobs = [job for job in bundle.jobs if job.id not in ended]
        bundle.left = len(jobs)
        if not jobs:
            await bundle.delivery.ack()
            return False
        if self._stopping:
            await self.redelivery.hand_back(bundle)
            return False
        bundle.touched_at = self._bus.clock.monotonic()
        self.runs.pace.came(len(jobs))
        self._bundles[bundle] = None
        self._holding.set()
        for job in jobs:
            self.queue.add(
                JobTicket(job, bundle, alone=bundle.suspect, whole=gives_optional(self.manifest, job.inputs))
            )
        return True

    async def _ended(self, bundle: Bundle, ids: Sequence[str]) -> set[str]:
        """Return finished jobs of a durable bundle that was redelivered, or that may have missed a cancellation."""
        told = bundle.delivery.attempt == 1 and self._withdrawn.would_know(bundle.delivery.stored_at)
        return set() if told or not bundle.durable else await self._results.ended(ids, pool=self._bus.pool)

    async def _watch(self) -> None:
        """Hand back bundles that will not run here soon."""
        while True:
            await self._holding.wait()
            await asyncio.sleep(AHEAD_S)
            for bundle in self._asking.to_hand_back(self._bundles):
                metrics.HANDED_BACK.labels(self.manifest.name).inc()
                self._leave(bundle)
            if not self._bundles:
                self._holding.clear()

    def _leave(self, bundle: Bundle) -> None:
        """Hand a bundle back as soon as none of its jobs runs."""
        self.queue.remove(lambda ticket: ticket.bundle is bundle)
        bundle.leaving = True
        if not bundle.running:
            self._bundles.pop(bundle, None)
            self._tasks.spawn(self._hand_back(bundle), "hand-back")

    async def _hand_back(self, bundle: Bundle) -> None:
        try:
            await self.redelivery.hand_back(bundle)
        finally:
            bundle.delivery.abandon()
            self._changed.set()

    def drop(self, jobs: Collection[str]) -> list[JobTicket]:
        """Remove queued jobs that have not begun and return them; their outcomes are not delivered."""
        dropped = self.queue.drop(jobs)
        for ticket in dropped:
            ticket.ended = True
            self._tasks.spawn(self._one_less(ticket.bundle), "drop")
        return dropped

    # runs

    async def _serve(self) -> None:
        """Begin the next run whenever an instance is free."""
        while True:
            while self._asking.running >= self._asking.copies or self._ending.full(self._asking.copies):
                self._changed.clear()
                await self._changed.wait()
            level = await self._asking.next_level()
            if not self._stopping and await self._asking.gathered(level, self._serving):
                continue
            turn = self.queue.take(level, self._serving.batching.max_batch_size, self._bus.clock.monotonic())
            self._begin(turn)

    def _begin(self, turn: NextRun) -> None:
        now, moment = self._bus.clock.utc(), self._bus.clock.monotonic()
        for ticket in turn.tickets:
            bundle = ticket.bundle
            bundle.running += 1
            bundle.touched_at = moment
            if not bundle.begun:
                bundle.begun = True
                self._release(bundle.delivery)
                if bundle.durable and not bundle.suspect:
                    self._tasks.spawn(self.redelivery.began(bundle), "note")
        over = [end for ticket in turn.tickets if (end := self._over(ticket, now)) is not None]
        if over:
            late = [end.ticket for end in over]
            self.queue.remove(lambda ticket: ticket in late)
            turn = turn.without(late)
            self._ending.expect()
            self._tasks.spawn(self._end(late, over), "work")
        if turn.tickets:
            self._ending.expect()
            self._asking.began()
            self._tasks.spawn(self._run(turn), "work")

    def _over(self, ticket: JobTicket, now: float) -> End | None:
        """Return the outcome of a job that must not run any more: withdrawn or expired."""
        if ticket.job.id in self._withdrawn:
            return self.runs.withdrawn(ticket)
        return self.runs.expired(ticket) if ticket.job.deadline <= now else None

    async def _run(self, turn: NextRun) -> None:
        ends: list[End] | None = None
        try:
            async with self.copies.pinned():
                if await self._loaded():
                    ends = await self._ends(turn)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            self._asking.ended()
            self._changed.set()
            await self._end(turn.tickets, ends)

    async def _ends(self, turn: NextRun) -> list[End]:
        """Run the jobs and return those that finished."""
        ticket = turn.tickets[0]
        if ticket.bundle.suspect and not ticket.attempt:
            ticket.attempt = -1  # recorded once, also if its rows take several runs
            begun = await self.redelivery.begin(ticket.bundle, ticket.job)
            if not isinstance(begun, int):
                ticket.ended = True
                self.queue.remove(lambda other: other is ticket)
                return [End(ticket, begun)]
            ticket.attempt = begun
        with self._under_way.limited(turn, self._serving.run_timeout_s) as going:
            done = await self.runs.run(turn.run, going, suspect=ticket.bundle.suspect)
        ends, again = self.runs.ends(turn, *done)
        for end in ends:
            if end.ticket.rows > 0:
                self.queue.remove(lambda other: other is end.ticket)  # noqa: B023
        for ticket in again:
            if not ticket.bundle.leaving:
                self.queue.again(ticket)
        self._asking.arrived.set()
        return ends

    async def _end(self, tickets: Sequence[JobTicket], ends: Sequence[End] | None) -> None:
        """Deliver the outcomes of a run; None or a failed delivery leaves the bundles for redelivery."""
        delivered = False
        with self._ending.sending(durable=tickets[0].bundle.durable):
            try:
                if ends is not None:
                    await self._deliver(ends)
                    delivered = True
            except TetherError as error:
                log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
            finally:
                moment = self._bus.clock.monotonic()
                for ticket in tickets:
                    ticket.bundle.running -= 1
                    ticket.bundle.touched_at = moment
                    if not delivered:
                        self._abandon(ticket.bundle)
        for end in (ends or ()) if delivered else ():
            await self._one_less(end.ticket.bundle)
        for bundle in bundles_of(tickets):
            if bundle.leaving and bundle in self._bundles:
                self._leave(bundle)

    def _ends_changed(self) -> None:
        self._asking.rest(durable=self._ending.durable_full)
        self._changed.set()

    async def _deliver(self, ends: Sequence[End]) -> None:
        told = [end for end in ends if end.outcome is not None]
        if not told:
            return
        await self.intake.deliver(
            bundles_of([end.ticket for end in told]), [end.outcome for end in told if end.outcome]
        )
        for ticket, _ in told:
            if ticket.bundle.suspect and not ticket.bundle.durable:
                await self.redelivery.answered(ticket.job)

    async def _one_less(self, bundle: Bundle) -> None:
        """Count one finished job; acknowledge the bundle after its last one."""
        bundle.left -= 1
        if not bundle.left:
            self._bundles.pop(bundle, None)
            await bundle.delivery.ack()
            await self.redelivery.over(bundle)
            self._changed.set()

    def _abandon(self, bundle: Bundle) -> None:
        """Leave a bundle for redelivery of its unfinished jobs."""
        self.queue.remove(lambda ticket: ticket.bundle is bundle)
        self._bundles.pop(bundle, None)
        bundle.delivery.abandon()

    async def wake(self) -> None:
        """Load the model before a job arrives."""
        async with self.copies.pinned():
            await self._loaded()

    async def _loaded(self) -> bool:
        """Load the model if needed. Return False if that fails: its jobs are then left for redelivery."""
        try:
            await self.copies.ensure()
        except Exception as error:  # noqa: BLE001 - reported by the listener
            self._hearing.lost(error)
            return False
        return True
