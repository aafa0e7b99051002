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
from tether.worker.runs.job_runs import FinishedJob, RunListeners, Runs
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
        isolated: IsolatedInstance,
        keepalive: KeepAlive,
        keyring: Keyring,
        *,
        listeners: RunListeners,
    ) -> None:
        self._bus = bus
        self._settings = bus.settings
        self.manifest = manifest
        self._isolated, self.instances = isolated, isolated.instances
        self._listeners = listeners
        self._keepalive = keepalive
        self.reader = BundleReader(bus, keyring, manifest.name)
        self._results = BusResults(bus)
        self.runs = Runs(bus.signer.name, bus.clock, manifest.name, isolated, listeners, room=bus.room)
        self.redelivery = Redelivery(bus, manifest.name)
        self._tasks = Tasks()
        self._serving = RunSpec(manifest.batching, (), 0.0, 0.0, LoadBalancing.LEAST_CONNECTIONS)
        self._pulls = [
            LaneConsumer(bus, lane, 1, self._on_delivery)
            for lane in lanes_of(manifest.name, manifest.version, self._settings.region, bus.pool)
        ]
        self._withdrawn = WithdrawnJobs(bus, self._pulls[0].lane)
        self._active_runs = ActiveRuns(bus.clock, self._withdrawn)
        self._withdrawn.changed = self._active_runs.end_withdrawn
        self._by_lane = {pull.lane: pull for pull in self._pulls}
        self.queue = RunQueue(self._settings.priority_patience_s, bus.clock.monotonic())
        slots, weight = self._settings.worker_prefetch, self._settings.worker_weight
        self._lane_pulls = LanePulls(self._pulls, self.queue, self.runs, bus.clock, slots=slots, weight=weight)
        self._bundles: dict[Bundle, None] = {}
        """Pending bundles in order of arrival, until they are settled or handed back."""
        self._waiting: set[str] = set()
        """Ack subjects of deliveries that take one of their lane's pulls: none of their jobs has begun."""
        self._changed = asyncio.Event()
        self._commit_slots = CommitSlots(self._on_slots_changed)
        self._has_bundles = asyncio.Event()
        self._stopping = False

    @property
    def running(self) -> int:
        """Return the number of jobs that run now."""
        return self.runs.running

    def configure(self, serving: RunSpec, copies: int) -> None:
        """Set the run limits and the number of concurrent runs, ``copies``, from the next run on."""
        self._serving = serving
        self.instances.limit(serving.run_timeout_s)
        self._lane_pulls.configure(serving.strategy, copies)
        self._changed.set()

    def update_capacity(self, factor: float, least: float) -> float:
        """Update open pulls by capacity (:meth:`.Capacity.update`); return the level, 0 if unknown or not used."""
        if self._serving.strategy is not LoadBalancing.CAPACITY:
            return 0.0
        capacity = self.runs.capacity
        before = capacity.turns
        capacity.update(factor, self._lane_pulls.instances, least)
        if capacity.turns != before:
            fields = {"action": "turns_changed", "model": self.manifest.name, "version": self.manifest.version}
            log.info("changed open pulls by capacity to %d from %d", capacity.turns, before, extra=fields)
            self._lane_pulls.share()
        return capacity.level

    async def start(self) -> None:
        self._tasks.spawn(self._serve(), f"serve-{self.manifest.name}")
        self._tasks.spawn(self._hand_back_loop(), f"serve-watch-{self.manifest.name}")
        await self._withdrawn.start()
        for pull in self._pulls:
            await pull.start()

    async def stop(self, shutdown_timeout_s: float) -> None:
        """Stop pulling, hand back durable and pending bundles, finish synchronous jobs, free the model."""
        for ended in await asyncio.gather(*[pull.stop() for pull in self._pulls], return_exceptions=True):
            if isinstance(ended, Exception):
                log.info("stopped a pull with an error: %s", ended, extra={"action": "pull_not_drained"})
        self._stopping = True
        gathered = bundles_of(self._lane_pulls.filling_batch)
        for bundle in list(self._bundles):
            if bundle not in gathered and (bundle.durable or not bundle.begun):
                self._hand_back_when_idle(bundle)
        self._lane_pulls.arrived.set()
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
        self._active_runs.end_all()
        serving = self._tasks.named("serve-")
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await self._tasks.finish(_LAST_S)
        await self._tasks.cancel()
        self._isolated.close()
        await self._withdrawn.stop()
        generation = self.instances.detach()
        if generation is not None:
            generation.close()

    # messages

    def _on_delivery(self, delivery: Delivery) -> None:
        infer = delivery.lane.kind is LaneKind.INFER
        wait = self._settings.infer_ack_wait_s if infer else self._settings.jobs_ack_wait_s
        self._keepalive.hold(delivery.ack_subject, wait, self._bus.clock.monotonic())
        self._waiting.add(delivery.ack_subject)
        delivery.on_settled = self._on_settled
        self._lane_pulls.on_message(level_of(delivery.lane))
        self._tasks.spawn(self._read_bundle(delivery), "open")

    def _on_settled(self, delivery: Delivery) -> None:
        self._keepalive.drop(delivery.ack_subject)
        self._release(delivery)

    def _release(self, delivery: Delivery) -> None:
        if delivery.ack_subject in self._waiting:
            self._waiting.discard(delivery.ack_subject)
            self._by_lane[delivery.lane].release()

    async def _read_bundle(self, delivery: Delivery) -> None:
        queued = False
        try:
            bundle = await self.reader.read(delivery)
            queued = bundle is not None and await self._queue_jobs(bundle)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            if not queued:
                delivery.abandon()
            self._lane_pulls.on_decoded(level_of(delivery.lane))
            self._changed.set()

    async def _queue_jobs(self, bundle: Bundle) -> bool:
        """Queue the unfinished jobs of a bundle. Return False if the bundle is settled already."""
        bundle.suspect = await self.redelivery.is_suspect(bundle)
        ids = [job.id for job in bundle.jobs]
        ended = await self._already_finished(bundle, ids)
        jobs = [job for job in bundle.jobs if job.id not in ended]
        bundle.unfinished = len(jobs)
        if not jobs:
            await bundle.delivery.ack()
            return False
        if self._stopping:
            await self.redelivery.hand_back(bundle)
            return False
        bundle.last_active_at = self._bus.clock.monotonic()
        self.runs.pace.record_message(len(jobs))
        self._bundles[bundle] = None
        self._has_bundles.set()
        for job in jobs:
            self.queue.add(
                JobTicket(job, bundle, alone=bundle.suspect, whole=gives_optional(self.manifest, job.inputs))
            )
        return True

    async def _already_finished(self, bundle: Bundle, ids: Sequence[str]) -> set[str]:
        """Return finished jobs of a durable bundle that was redelivered, or that may have missed a cancellation."""
        cancellations_known = bundle.delivery.attempt == 1 and self._withdrawn.would_know(bundle.delivery.stored_at)
        return (
            set() if cancellations_known or not bundle.durable else await self._results.ended(ids, pool=self._bus.pool)
        )

    async def _hand_back_loop(self) -> None:
        """Hand back bundles that will not run here soon."""
        while True:
            await self._has_bundles.wait()
            await asyncio.sleep(AHEAD_S)
            for bundle in self._lane_pulls.to_hand_back(self._bundles):
                metrics.HANDED_BACK.labels(self.manifest.name).inc()
                self._hand_back_when_idle(bundle)
            if not self._bundles:
                self._has_bundles.clear()

    def _hand_back_when_idle(self, bundle: Bundle) -> None:
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
            self._tasks.spawn(self._count_finished(ticket.bundle), "drop")
        return dropped

    # runs

    async def _serve(self) -> None:
        """Begin the next run whenever an instance is free."""
        while True:
            while self._lane_pulls.running >= self._lane_pulls.instances or self._commit_slots.full(
                self._lane_pulls.instances
            ):
                self._changed.clear()
                await self._changed.wait()
            level = await self._lane_pulls.next_level()
            if not self._stopping and await self._lane_pulls.wait_for_more(level, self._serving):
                continue
            turn = self.queue.take(level, self._serving.batching.max_batch_size, self._bus.clock.monotonic())
            self._begin_run(turn)

    def _begin_run(self, turn: NextRun) -> None:
        now, moment = self._bus.clock.utc(), self._bus.clock.monotonic()
        for ticket in turn.tickets:
            bundle = ticket.bundle
            bundle.running += 1
            bundle.last_active_at = moment
            if not bundle.begun:
                bundle.begun = True
                self._release(bundle.delivery)
                if bundle.durable and not bundle.suspect:
                    self._tasks.spawn(self.redelivery.record_begin(bundle), "note")
        ended = [job for ticket in turn.tickets if (job := self._end_without_run(ticket, now)) is not None]
        if ended:
            late = [job.ticket for job in ended]
            self.queue.remove(lambda ticket: ticket in late)
            turn = turn.without(late)
            self._commit_slots.expect()
            self._tasks.spawn(self._deliver_and_settle(late, ended), "work")
        if turn.tickets:
            self._commit_slots.expect()
            self._lane_pulls.began()
            self._tasks.spawn(self._run(turn), "work")

    def _end_without_run(self, ticket: JobTicket, now: float) -> FinishedJob | None:
        """Return the outcome of a job that must not run any more: withdrawn or expired."""
        if ticket.job.id in self._withdrawn:
            return self.runs.withdrawn(ticket)
        return self.runs.expired(ticket) if ticket.job.deadline <= now else None

    async def _run(self, turn: NextRun) -> None:
        finished: list[FinishedJob] | None = None
        try:
            async with self.instances.pinned():
                if await self._ensure_loaded():
                    finished = await self._run_jobs(turn)
        except TetherError as error:
            log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
        finally:
            self._lane_pulls.ended()
            self._changed.set()
            await self._deliver_and_settle(turn.tickets, finished)

    async def _run_jobs(self, turn: NextRun) -> list[FinishedJob]:
        """Run the jobs and return those that finished."""
        ticket = turn.tickets[0]
        if ticket.bundle.suspect and not ticket.attempt:
            ticket.attempt = -1  # recorded once, also if its rows take several runs
            begun = await self.redelivery.record_attempt(ticket.bundle, ticket.job)
            if not isinstance(begun, int):
                ticket.ended = True
                self.queue.remove(lambda other: other is ticket)
                return [FinishedJob(ticket, begun)]
            ticket.attempt = begun
        with self._active_runs.limited(turn, self._serving.run_timeout_s) as active_run:
            results = await self.runs.run(turn.run, active_run, suspect=ticket.bundle.suspect)
        finished, repeated = self.runs.finished_jobs(turn, *results)
        for job in finished:
            if job.ticket.rows > 0:
                self.queue.remove(lambda other: other is job.ticket)  # noqa: B023
        for ticket in repeated:
            if not ticket.bundle.leaving:
                self.queue.requeue_whole(ticket)
        self._lane_pulls.arrived.set()
        return finished

    async def _deliver_and_settle(self, tickets: Sequence[JobTicket], finished: Sequence[FinishedJob] | None) -> None:
        """Deliver the outcomes of a run; None or a failed delivery leaves the bundles for redelivery."""
        delivered = False
        with self._commit_slots.sending(durable=tickets[0].bundle.durable):
            try:
                if finished is not None:
                    await self._deliver(finished)
                    delivered = True
            except TetherError as error:
                log.warning("left for redelivery: %s", error, extra={"action": "work_interrupted", "code": error.code})
            finally:
                moment = self._bus.clock.monotonic()
                for ticket in tickets:
                    ticket.bundle.running -= 1
                    ticket.bundle.last_active_at = moment
                    if not delivered:
                        self._abandon(ticket.bundle)
        for job in (finished or ()) if delivered else ():
            await self._count_finished(job.ticket.bundle)
        for bundle in bundles_of(tickets):
            if bundle.leaving and bundle in self._bundles:
                self._hand_back_when_idle(bundle)

    def _on_slots_changed(self) -> None:
        self._lane_pulls.pause_durable(durable=self._commit_slots.durable_full)
        self._changed.set()

    async def _deliver(self, finished: Sequence[FinishedJob]) -> None:
        undelivered = [job for job in finished if job.outcome is not None]
        if not undelivered:
            return
        await self.reader.deliver(
            bundles_of([job.ticket for job in undelivered]), [job.outcome for job in undelivered if job.outcome]
        )
        for ticket, _ in undelivered:
            if ticket.bundle.suspect and not ticket.bundle.durable:
                await self.redelivery.record_answered(ticket.job)

    async def _count_finished(self, bundle: Bundle) -> None:
        """Count one finished job; acknowledge the bundle after its last one."""
        bundle.unfinished -= 1
        if not bundle.unfinished:
            self._bundles.pop(bundle, None)
            await bundle.delivery.ack()
            await self.redelivery.delete_notes(bundle)
            self._changed.set()

    def _abandon(self, bundle: Bundle) -> None:
        """Leave a bundle for redelivery of its unfinished jobs."""
        self.queue.remove(lambda ticket: ticket.bundle is bundle)
        self._bundles.pop(bundle, None)
        bundle.delivery.abandon()

    async def wake(self) -> None:
        """Load the model before a job arrives."""
        async with self.instances.pinned():
            await self._ensure_loaded()

    async def _ensure_loaded(self) -> bool:
        """Load the model if needed. Return False if that fails: its jobs are then left for redelivery."""
        try:
            await self.instances.ensure()
        except Exception as error:  # noqa: BLE001 - reported by the listener
            self._listeners.lost(error)
            return False
        return True
