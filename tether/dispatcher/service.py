"""The dispatcher service: registration, liveness, lanes, assignments, routes.

It keeps no state of its own: epochs are in ``assign``, versions in ``models``, and workers' state returns
with their next heartbeats. Without a dispatcher, loaded models are still served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from tether.audit import Kind
from tether.audit.writer import AuditLog, writing
from tether.bus import rpc
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.session import connect
from tether.crypto import MAX_SKEW_MS, Envelope, MessageType
from tether.dispatcher import assignments
from tether.dispatcher.jobs.retention import Retention
from tether.dispatcher.jobs.sweeper import sweeping
from tether.dispatcher.lanes.consumer_check import LaneCheck
from tether.dispatcher.lanes.deleted_versions import DeletedVersionLanes
from tether.dispatcher.lanes.infer_streams import InferStreams
from tether.dispatcher.lanes.stream_upkeep import Streams
from tether.dispatcher.lanes.tenant_pools import Pools
from tether.dispatcher.lanes.version_lanes import VersionLanes
from tether.dispatcher.model_configs import ModelConfigMirror
from tether.dispatcher.retried_steps import Steps
from tether.dispatcher.version_findings import Findings
from tether.dispatcher.worker_capacity import CapacityBaseline
from tether.dispatcher.worker_inventory import WorkerInventory
from tether.domain.job import SHARED
from tether.domain.manifest import Assignment, Epoch, Heartbeat, Manifest, ModelRef, Registration, Route, check_name
from tether.domain.worker_protocol import StreamsMade
from tether.errors import BadEncoding, Forbidden, TetherError
from tether.process import daemon, lifecycle, metrics
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.wire import codec

log = logging.getLogger(__name__)

DEFAULT_PORT = 8002
_TICK_S = 0.5
_AGAIN_S = 0.2
_LOOK_S = 10.0
_LATE_S = 30.0
"""Seconds without a completed reconciliation after which a dispatcher is not ready."""
_SOON_S = 1.0
"""Seconds between two checks after versions were deleted."""


class Dispatcher:
    """One dispatcher on one connection. Use :func:`running`."""

    def __init__(self, bus: Bus, audit: AuditLog) -> None:
        self._bus = bus
        self._audit = audit
        self._settings = bus.settings
        self._assign = SignedBucket(bus, "assign", MessageType.ASSIGN)
        self._routes = SignedBucket(bus, "routes", MessageType.ROUTE)
        self._epochs: dict[str, int] = {}
        self._workers: dict[str, assignments.LastHeartbeat] = {}
        self._models: set[ModelRef] = set()
        self._regions: set[str] = {bus.settings.region}
        self.lanes = VersionLanes(bus)
        self._steps = Steps(bus)
        self._bound: dict[str, str] = {}
        """The pool of each worker by the keyset, not by its own claim."""
        self._pools = Pools(bus)
        self.streams = Streams(bus, self._pools, self._steps)
        self._assigned: dict[str, Assignment] = {}
        self._routed: dict[assignments.Place, Route] = {}
        self._changed = asyncio.Event()
        self.infer = InferStreams(bus, self._routes, on_made=self.lanes.reset, on_change=self._changed.set)
        self.decided = ModelConfigMirror(bus, self._changed.set)
        self.ended = DeletedVersionLanes(bus)
        self.retention = Retention(bus)
        self._levels = CapacityBaseline()
        self._findings = Findings()
        self.crew = WorkerInventory(bus.settings.worker_timeout_s, bus.settings.max_instances)
        self._lanes_searched_at = float("-inf")
        """When lanes of deleted versions were last searched, in monotonic seconds."""
        self._look_soon = False
        self._rewrite_needed = False
        """Whether the broker may have lost acknowledged writes."""
        self._reconciled_at = bus.clock.monotonic()
        """When assignments and routes were last reconciled."""
        self._started_at = bus.clock.monotonic()
        """Start of this dispatcher: until every worker had time for a heartbeat, no route loses a worker."""
        bus.on_reconnect(self._on_reconnect)

    @property
    def closed(self) -> lifecycle.Termination:
        return self._bus.closed

    def _on_reconnect(self) -> None:
        """Assume that the broker lost its in-memory data: infer lanes and liveness."""
        self.streams.reset()
        self._rewrite_needed = True
        self._started_at = self._bus.clock.monotonic()
        self.lanes.reset()
        self.ended.reset()
        self._look_soon = True
        self._changed.set()

    async def prepare(self) -> None:
        """Create streams and buckets, and read what the last dispatcher wrote.

        Raises:
            TetherError: the broker refuses a stream, or the buckets ``assign`` and ``routes`` cannot be read.
        """
        await self.streams.prepare()
        for key, body in (await self._assign.entries()).items():
            known = codec.decode(body, Assignment)
            self._epochs[key] = known.epoch
            self._assigned[key] = known
            self._bound[key] = known.pool
        for key, body in (await self._routes.entries()).items():
            if key == StreamsMade.KEY:
                self.infer.adopt(body)
                continue
            route = codec.decode(body, Route)
            self._routed[route.pool, ModelRef(route.model, route.version)] = route
            self._findings.remember(route)

    async def prepare_pools(self) -> None:
        """Read which versions each tenant may use, before workers get assignments."""
        await self._pools.update()

    async def register(self, envelope: Envelope) -> bytes:
        """Handle ``registerWorker``: assign a new epoch for heartbeats, or confirm the current one."""
        request = codec.decode(envelope.body, Registration)
        check_name(request.region, field="region")
        if request.worker != envelope.sender:
            self._note(envelope, Forbidden.code, f"as '{request.worker}'")
            raise Forbidden(
                f"identity '{envelope.sender}' may not register as worker '{request.worker}'", field="worker"
            )
        if request.epoch and request.epoch == self._epochs.get(request.worker):
            return codec.encode(Epoch(request.epoch))
        epoch = self._epochs.get(request.worker, 0) + 1
        self._epochs[request.worker] = epoch
        self._bind(envelope)
        self._workers.pop(request.worker, None)
        self.crew.record(request.worker, request, self._bus.clock.monotonic())
        self._regions.add(request.region)
        await self._write_assignments()
        self._changed.set()
        log.info(
            "epoch %d for %s", epoch, request.worker, extra={"action": "worker_registered", "worker": request.worker}
        )
        self._note(envelope, "ok", f"epoch {epoch}, region {request.region}")
        return codec.encode(Epoch(epoch))

    def _note(self, envelope: Envelope, outcome: str, detail: str) -> None:
        tenant = envelope.sender_tenant
        self._audit.record(
            Kind.IDENTITY, tenant, actor=envelope.sender, action="register worker", outcome=outcome, detail=detail
        )

    def _bind(self, envelope: Envelope) -> None:
        """Bind a worker to the pool of its key in the keyset."""
        worker, pool = envelope.sender, envelope.sender_tenant or SHARED
        if self._bound.get(worker, SHARED) != pool:
            self._changed.set()
        self._bound[worker] = pool
        if pool != SHARED and not self._pools.isolated(pool):
            log.warning(
                "'%s' is bound to tenant '%s', which is not isolated: it only drains the tenant's lanes",
                worker,
                pool,
                extra={"action": "worker_without_pool", "worker": worker, "tenant": pool},
            )

    def on_heartbeat(self, key: str, frame: bytes | None) -> None:
        """Accept a heartbeat if the worker itself signed it and it carries the worker's epoch."""
        if frame is None:
            return
        envelope = self._bus.verify_frame(
            frame, self._bus.names.bucket_key("liveness", key), MessageType.HEARTBEAT, max_age_ms=rpc.MAX_AGE_MS
        )
        if envelope is None or envelope.sender != key:
            return
        try:
            beat = codec.decode(envelope.body, Heartbeat)
        except BadEncoding as error:
            log.warning("rejected a heartbeat: %s", error, extra={"action": "heartbeat_refused", "sender": key})
            return
        # a worker whose record is missing, or older than its epoch as after a power cut, keeps its epoch
        if beat.epoch < self._epochs.get(key, 0):
            return
        self._epochs[key] = beat.epoch
        self._regions.add(beat.region)
        if self._bound.get(key, SHARED) != (envelope.sender_tenant or SHARED):
            self._bind(envelope)
        last = self._workers.get(key)
        self._workers[key] = assignments.LastHeartbeat(beat, now := self._bus.clock.monotonic())
        self.crew.record(key, beat, now)
        news = self._bound.get(key, SHARED) == beat.pool and self._findings.record(beat, self._models)
        if news or last is None or last.heartbeat.ready != beat.ready:
            self._changed.set()

    def model_changed(self, key: str, body: bytes | None) -> None:
        if body is None:
            for ref in [ref for ref in self._models if self._bus.names.version_key(ref.model, ref.version) == key]:
                self._models.remove(ref)
                self.decided.owners.gone(ref.model, ref.version)
            self._look_soon = True
        else:
            manifest = codec.decode(body, Manifest)
            self._models.add(ModelRef(manifest.name, manifest.version))
            self.crew.version(manifest)
            self.decided.owners.manifest(manifest)
        self._changed.set()

    def tenant_changed(self, key: str, body: bytes | None) -> None:
        self._pools.tenant_changed(key, body)
        self._changed.set()

    async def run(self) -> None:
        """Reconcile lanes, assignments and routes on every change and every half second."""
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            self.lanes.wake.set()
            if await self.reconcile():
                self._reconciled_at = self._bus.clock.monotonic()
            else:
                await asyncio.sleep(_AGAIN_S)

    async def reconcile(self) -> bool:
        """Run all steps, also after one failed; return True if all succeeded."""
        steps = {
            "tenants": self._pools.ensure,
            "rewritten entries": self._write_again,
            "deleted versions": self._end_versions,
            "assignments": self._write_assignments,
            "routes": self._write_routes,
        }
        return all([await self._steps.succeeded(what, step()) for what, step in steps.items()])

    async def _end_versions(self) -> None:
        now = self._bus.clock.monotonic()
        if now - self._lanes_searched_at >= (_SOON_S if self._look_soon else _LOOK_S):
            self._lanes_searched_at, self._look_soon = now, False
            for place in await self.ended.find(self._models, list(self._routed)):
                route = self._routed.pop(place)
                self._findings.forget(place)
                await self._routes.delete(self._bus.names.version_key(route.model, route.version, route.pool))
        await self.ended.step()

    async def _write_again(self) -> None:
        """Rewrite assignments and routes after a reconnection: a broker that lost power may have older ones."""
        if not self._rewrite_needed:
            return
        self._rewrite_needed = False
        try:
            await self._write_lost(self._assign, {worker: codec.encode(one) for worker, one in self._assigned.items()})
            routes = {
                self._bus.names.version_key(route.model, route.version, route.pool): codec.encode(route)
                for route in self._routed.values()
            }
            await self._write_lost(self._routes, routes)
        except TetherError:
            self._rewrite_needed = True
            raise

    async def _write_lost(self, bucket: SignedBucket, written: Mapping[str, bytes]) -> None:
        there = await bucket.entries()
        for key, body in written.items():
            if there.get(key) != body:
                await bucket.put(key, body)

    def _usable(self) -> assignments.Models:
        """Return the versions that each pool may use."""
        return self._pools.models(self._models, self.decided.owners)

    async def keep_lanes(self) -> None:
        """Create the lanes of every served version in every region with a worker."""
        await self.lanes.keep(self._usable, lambda: tuple(self._regions))

    async def _write_assignments(self) -> None:
        models = self.decided.served(self._usable(), self._routed)
        living, now = self._living(), self._bus.clock.monotonic()
        held = self.crew.place(
            models,
            pools=self._bound,
            assigned=self._assigned,
            living=living,
            configs=self.decided.configs,
            now=now,
            listening=now - self._started_at < self._settings.worker_timeout_s,
        )
        ended = assignments.working_off(self.ended.groups(), living, self._bound)
        levels = self._levels.least(living, self._bound)
        revisions, known = self.decided.revisions(), self._findings.known
        wanted = assignments.assignments(
            self._epochs,
            self._bound,
            held,
            ended,
            revisions,
            levels=levels,
            findings=known,
            streams=self.infer.made,
        )
        for worker, assignment in wanted.items():
            if self._assigned.get(worker) != assignment:
                await self._assign.put(worker, codec.encode(assignment))
                self._assigned[worker] = assignment

    def _living(self) -> dict[str, Heartbeat]:
        return assignments.alive(self._workers, self._bus.clock.monotonic(), self._settings.worker_timeout_s)

    async def _write_routes(self) -> None:
        now = self._bus.clock.monotonic()
        living = self._living()
        metrics.WORKERS_READY.set(len(living))
        waiting = now - self._started_at < self._settings.worker_timeout_s
        found = assignments.routes(living, self._bound, self._usable(), self.crew.reasons, self._findings.known)
        for place, new in {**self._orphaned_routes(found), **found}.items():
            before = self._routed.get(place)
            route = assignments.steady(new, before)
            if waiting and before is not None and not set(before.workers) <= set(route.workers):
                continue
            if before != route:
                key = self._bus.names.version_key(route.model, route.version, route.pool)
                await self._routes.put(key, codec.encode(route))
                self._routed[place] = route

    def _orphaned_routes(self, found: Mapping[assignments.Place, Route]) -> dict[assignments.Place, Route]:
        """Return stored routes that no worker serves: of deleted versions and formerly isolated tenants."""
        gone = [place for place in self._routed if place not in found]
        return {place: msgspec.structs.replace(self._routed[place], workers=()) for place in gone}

    def checks(self) -> dict[str, str]:
        late_s = self._bus.clock.monotonic() - self._reconciled_at
        return {
            "broker": "ok" if self._bus.connected else "not connected",
            "streams": "ok" if self.streams.ok else "streams or buckets are not as configured yet",
            "work": "ok" if late_s < _LATE_S else f"routes were last updated {late_s:.0f} s ago",
        }


@asynccontextmanager
async def running(settings: Settings, home: Home) -> AsyncIterator[Dispatcher]:
    """Run a dispatcher until the block ends."""
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(settings, home, "dispatcher"))
        tasks = await stack.enter_async_context(lifecycle.tasks())
        dispatcher = Dispatcher(bus, await stack.enter_async_context(writing(bus, home, tasks)))
        await dispatcher.prepare()
        models = SignedBucket(bus, "models", MessageType.MANIFEST)
        await stack.enter_async_context(models.watch(dispatcher.model_changed))
        tenants = SignedBucket(bus, "tenants", MessageType.TENANT)
        await stack.enter_async_context(tenants.watch(dispatcher.tenant_changed))
        await stack.enter_async_context(dispatcher.decided.watching())
        await dispatcher.prepare_pools()
        await stack.enter_async_context(KvBucket(bus, "liveness").watch(dispatcher.on_heartbeat, refetch=False))
        serving = rpc.serve(
            bus,
            "registerWorker",
            accepts=MessageType.REGISTER,
            answers=MessageType.REGISTERED,
            handler=dispatcher.register,
            grace_ms=MAX_SKEW_MS,
        )
        await stack.enter_async_context(serving)
        tasks.spawn(dispatcher.run(), "reconcile")
        tasks.spawn(dispatcher.streams.keep(), "streams")
        tasks.spawn(dispatcher.infer.keep(), "infer-streams")
        tasks.spawn(dispatcher.keep_lanes(), "lanes")
        lanes = LaneCheck(bus)
        tasks.spawn(lanes.run(), "lane-check")
        await stack.enter_async_context(sweeping(bus, lanes, tasks))
        tasks.spawn(dispatcher.retention.run(), "retention")
        yield dispatcher


async def main(settings: Settings) -> None:
    """Run the dispatcher until SIGTERM or SIGINT."""
    await daemon.run(settings, "dispatcher", DEFAULT_PORT, running)
