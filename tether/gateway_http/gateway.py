"""The gateway's core: validates and resolves a request, submits it and waits for its outputs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import lru_cache

from tether.audit import NOBODY, clean
from tether.audit.writer import AuditLog, writing
from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import Keyring, ModelKeyring, TenantSeals
from tether.bus.session import connect
from tether.domain.job import Job, new_job_id
from tether.domain.manifest import LATEST, ModelRef, check_outputs
from tether.domain.tensor import Tensor
from tether.errors import JobCancelled, TetherError
from tether.gateway_http.access.authentication import ApiKeys, Caller
from tether.gateway_http.access.rate_limits import RateLimits
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.bodies.large_bodies import LargeBodies
from tether.gateway_http.bundling import recreated_streams
from tether.gateway_http.bundling.infer_bundler import InferBundler
from tether.gateway_http.bundling.queue_policy import waits
from tether.gateway_http.http.body_deadline import BodyTimeouts
from tether.gateway_http.http.disconnects import Disconnects
from tether.gateway_http.http.request import Headers, RequestHeaders
from tether.gateway_http.http.request_turns import RequestTurns
from tether.gateway_http.inference.request_features import RequestFeatures
from tether.gateway_http.inference.request_plan import AdmittedRequest
from tether.gateway_http.jobs.queued_jobs_quota import QueuedJobsQuota
from tether.gateway_http.jobs.service import JobService
from tether.gateway_http.models.catalog import Catalog, ResolvedVersion
from tether.gateway_http.models.chunk_possession import ChunkPossession
from tether.gateway_http.models.chunk_shares import ChunkShares
from tether.gateway_http.models.encrypted_models import EncryptedModels
from tether.gateway_http.models.unreferenced_chunks import UnreferencedChunks
from tether.gateway_http.models.worker_heartbeats import Heartbeats
from tether.gateway_http.readiness import Readiness
from tether.process import lifecycle, metrics
from tether.process.data_dir import Home
from tether.process.lifecycle import Tasks
from tether.settings import Settings
from tether.streams.broker_storage import BrokerStorage


class Gateway:
    """Shared services of all routes. Use :func:`running`."""

    def __init__(self, bus: Bus, tasks: Tasks, audit: AuditLog, keyring: Keyring, model_keyring: ModelKeyring) -> None:
        self.bus = bus
        self.encrypted_models = EncryptedModels(bus, model_keyring)
        self.audit = audit
        self.settings = bus.settings
        self.storage = BrokerStorage(bus.settings, bus.clock)
        self.readiness = Readiness(bus, self.storage)
        self.body_timeouts = BodyTimeouts(bus.settings.body_timeout_s)
        self.disconnects = Disconnects()
        self.catalog = Catalog(bus)
        self.heartbeats = Heartbeats(bus)
        self.tenants = Tenants(bus)
        self.chunk_possession = ChunkPossession(bus, self.catalog, self.encrypted_models)
        self.keys = ApiKeys(bus, self.tenants, self.catalog.owners)
        share = ChunkShares(bus, self.catalog.stored, self.keys.others).require
        self.unreferenced_chunks = UnreferencedChunks(bus.clock.monotonic, self.catalog.stored.of, share)
        self.limits = RateLimits(bus, tasks, self.keys.find, self.tenants.find)
        self.request_turns = RequestTurns(self.tenants.weight)
        self.tenant_encryption = TenantSeals(bus, keyring, self.tenants)
        room = QueuedJobsQuota(bus, self.tenants)
        self.large_bodies = LargeBodies(str(Home.at(bus.settings.home).root), self.tenants.weight)
        self.jobs = JobService(
            bus,
            self.catalog,
            self.tenants,
            tasks,
            self.tenant_encryption,
            room=room,
            shared=self.keys.others,
            large=self.large_bodies,
        )
        self._bundler = InferBundler(
            bus, tasks, self.catalog.worker_count, keyring, self.tenants.weight, policy=self.catalog.queue
        )
        metrics.INFER_INFLIGHT.set_function(lambda: self._bundler.held)
        self._copies = InferBundler(bus, tasks, self.catalog.worker_count, keyring, self.tenants.weight)
        self.features = RequestFeatures(
            bus, tasks, self.catalog, self.tenants, self.tenant_encryption, bundler=self._bundler, copies=self._copies
        )
        self._seconds = lru_cache(maxsize=4096)(metrics.INFER_SECONDS.labels)

    @property
    def closed(self) -> lifecycle.Termination:
        return self.bus.closed

    @property
    def inflight(self) -> int:
        """Bundles with at least one awaited job."""
        return self._bundler.in_flight

    def held(self, model: str) -> int:
        """Return the number of unanswered requests for a model."""
        return self._bundler.pending_for_model(model)

    def stream_renewed(self, streams: set[str]) -> None:
        """Resend bundles of infer streams that lost their messages."""
        for bundler in (self._bundler, self._copies):
            bundler.stream_renewed(streams)

    async def start(self) -> None:
        await self._bundler.start()
        await self.features.shadows.start()

    async def authenticated(self, heading: RequestHeaders, scope: str) -> Caller:
        """Authenticate a request and wait for its tenant's turn; unknown keys take turns as one tenant.

        Raises:
            Unauthenticated, Forbidden: see :meth:`ApiKeys.authenticate`.
        """
        try:
            caller = self.keys.authenticate(heading.key, scope)
        except TetherError:
            await self.request_turns.enter("")
            raise
        await self.request_turns.enter(caller.tenant, heading.length)
        return caller

    async def infer(
        self,
        served: ResolvedVersion,
        tenant: str,
        inputs: tuple[Tensor, ...],
        outputs: tuple[str, ...],
        *,
        request_id: str,
        traceparent: str = "",
        timeout_s: float,
        actor: str = NOBODY,
        alias: str = "",
        notes: Headers | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the requested outputs, in order. ``alias`` is the version as written, ``notes`` collects headers.

        Raises:
            BadTensor: inputs or outputs do not match the model's signature; nothing was queued.
            ModelNotReady, ModelUnloaded, QueueFull, Unavailable: retry later, or once it is loaded again.
            DeadlineExceeded: no reply within ``timeout_s`` seconds, or not started within its model's
                queue timeout.
            ClientDisconnected: the client disconnected; the job was withdrawn.
            InferenceFailed: the model failed on this input.
        """
        pool = self._admit(served, tenant, inputs, outputs)
        timeout_s, queued_s = self._request_timeouts(name := served.manifest.name, timeout_s)
        started = self.bus.clock.monotonic()
        job = Job(new_job_id(), tenant, inputs, self.bus.clock.utc() + queued_s, outputs, request_id, traceparent)
        outcome, job_id = JobCancelled.code, str(job.id)
        answer: tuple[Tensor, ...] = ()
        try:
            plan = self.features.plans.get(name)
            if plan is None:
                waiting = self._bundler.answer(served.lane(pool), self.tenant_encryption.seal(job), timeout_s)
                answer = await self.disconnects.wait(waiting)
            else:
                asked = AdmittedRequest(plan, served, alias or LATEST, pool, job, timeout_s)
                answer, job_id = await self.disconnects.wait(self.features.answer(asked, notes))
            await self.request_turns.answered(tenant)
            outcome = "ok"
        except TetherError as error:
            outcome = error.code
            raise
        finally:
            seconds = self.bus.clock.monotonic() - started
            self.audit.inference(
                tenant,
                actor,
                "infer",
                outcome,
                name,
                served.manifest.version,
                job_id,
                clean(request_id),
                sum([len(tensor.data) for tensor in inputs]),
                sum([len(tensor.data) for tensor in answer]),
                int(seconds * 1e6),
            )
        self._seconds(name).observe(seconds)
        return answer

    def _admit(self, served: ResolvedVersion, tenant: str, inputs: tuple[Tensor, ...], outputs: tuple[str, ...]) -> str:
        """Check that a request can run; return its pool."""
        pool = self.tenants.pool(tenant)
        self.catalog.check_inputs(served, inputs, pool)
        if outputs:
            check_outputs(served.manifest, outputs)
        self.catalog.require_worker(served, pool)
        return pool

    def _request_timeouts(self, model: str, timeout_s: float) -> tuple[float, float]:
        policy = self.catalog.queue(model)
        return (timeout_s, timeout_s) if policy is None else waits(policy, timeout_s, self.settings.request_timeout_s)

    def ready(self, served: ResolvedVersion, pool: str) -> bool:
        """Return True if a worker in the version's route has recently confirmed that it hosts the version."""
        manifest = served.manifest
        if not self.catalog.ready(served, pool) or not self.readiness.infers():
            return False
        ref = ModelRef(manifest.name, manifest.version)
        return any(self.heartbeats.holds(worker, ref) for worker in self.catalog.workers(served, pool))

    def checks(self) -> dict[str, str]:
        """Return the dependencies of ``/readyz``."""
        return self.readiness.checks()


@asynccontextmanager
async def running(settings: Settings, home: Home) -> AsyncIterator[Gateway]:
    """Run a connected gateway with filled caches until the block ends. It does not listen yet."""
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(settings, home, "gateway"))
        tasks = await stack.enter_async_context(lifecycle.tasks())
        audit = await stack.enter_async_context(writing(bus, home, tasks))
        keyrings = Keyring(bus, home, every=True), ModelKeyring(bus, home, every=True)
        gateway = Gateway(bus, tasks, audit, *keyrings)
        stack.push_async_callback(gateway.large_bodies.close)
        await stack.enter_async_context(gateway.tenants.watching())
        await stack.enter_async_context(gateway.keys.watching())
        tasks.spawn(gateway.keys.uses.keep(), "key-uses")
        await stack.enter_async_context(gateway.tenant_encryption.keyring.watching())
        tasks.spawn(gateway.tenant_encryption.keep(), "tenant-keys")
        await stack.enter_async_context(gateway.encrypted_models.keyring.watching())
        await stack.enter_async_context(gateway.catalog.watching())
        await stack.enter_async_context(gateway.heartbeats.listening())
        await stack.enter_async_context(gateway.limits.talking())
        await gateway.start()
        await stack.enter_async_context(recreated_streams.following(bus, gateway.stream_renewed))
        tasks.spawn(gateway.storage.keep(), "storage")
        tasks.spawn(gateway.readiness.keep(), "readiness")
        yield gateway
