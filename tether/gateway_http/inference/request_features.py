"""Response caching and shadow traffic for synchronous requests.

Models without either have no plan, and their requests bypass this module.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import TenantSeals
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.bundling.infer_bundler import InferBundler
from tether.gateway_http.bundling.pending_request import Answer
from tether.gateway_http.http.request import Headers
from tether.gateway_http.inference.request_coalescer import HIT, MISS, RequestCoalescer
from tether.gateway_http.inference.request_plan import AdmittedRequest, RequestPlan
from tether.gateway_http.inference.response_cache import CacheLookup, ResponseCache, digest_of
from tether.gateway_http.inference.shadow_traffic import Shadows
from tether.gateway_http.models.catalog import Catalog
from tether.process import metrics
from tether.process.lifecycle import Tasks


class RequestFeatures:
    """The plans of all models, and the handling of requests that have one."""

    def __init__(
        self,
        bus: Bus,
        tasks: Tasks,
        catalog: Catalog,
        tenants: Tenants,
        seals: TenantSeals,
        *,
        bundler: InferBundler,
        copies: InferBundler,
    ) -> None:
        settings = bus.settings
        self._catalog = catalog
        self._tenants = tenants
        self._seals = seals
        self._bundler = bundler
        self._generations = itertools.count(1)
        self._caching = settings.response_cache_mb > 0
        cache = ResponseCache(settings.response_cache_mb << 20, bus.clock.monotonic)
        self.kept = RequestCoalescer(cache, bus.clock.monotonic, settings.max_inflight)
        self.shadows = Shadows(bus, tasks, catalog, seals, callers=bundler, bundler=copies)
        self.plans: dict[str, RequestPlan] = {}
        metrics.CACHE_BYTES.set_function(lambda: cache.size)
        catalog.on_change(self._model_changed)
        tenants.on_change(cache.drop_tenant)

    def _model_changed(self, model: str) -> None:
        had = self.plans.pop(model, None)
        if had is not None and had.cache_ttl_s:
            self.kept.cache.drop_model(model)
        config = self._catalog.config(model)
        ttl_s = config.cache_ttl_s if self._caching else 0.0
        shadows = self.shadows.follow(model, config.shadows)
        if ttl_s or shadows:
            self.plans[model] = RequestPlan(next(self._generations), ttl_s, shadows)

    async def answer(self, asked: AdmittedRequest, notes: Headers | None) -> tuple[Answer, str]:
        """Return the outputs and the id of the job that was run; the id is empty for a cached reply.

        Appends response headers to ``notes``.

        Raises:
            TetherError: as :meth:`InferBundler.submit` and its future.
        """
        if asked.plan.cache_ttl_s and self._may_cache(asked.job.tenant):
            answer, hit = await self._answer_cached(asked, notes)
        else:
            lane, job = asked.served.lane(asked.pool), self._seals.seal(asked.job)
            answer, hit = await self._bundler.answer(lane, job, asked.timeout_s), False
        if asked.plan.shadows and not hit:
            self.shadows.mirror(asked, answer)
        return answer, "" if hit else asked.job.id

    async def _answer_cached(self, asked: AdmittedRequest, notes: Headers | None) -> tuple[Answer, bool]:
        plan, manifest, tenant = asked.plan, asked.served.manifest, asked.job.tenant
        digest = digest_of(asked.job, asked.pool, manifest.name, manifest.version, plan.generation)
        question = CacheLookup(tenant, manifest.name, digest, asked.timeout_s, plan.cache_ttl_s)
        answer, hit = await self.kept.answer(
            question,
            partial(self._submit, asked),
            partial(self._bundler.withdraw, asked.job.id),
            lambda: self.plans.get(manifest.name) is plan and self._may_cache(tenant),
        )
        if notes is not None:
            notes.append(HIT if hit else MISS)
        return answer, hit

    def _submit(self, asked: AdmittedRequest, timeout_s: float) -> asyncio.Future[Answer]:
        return self._bundler.submit(asked.served.lane(asked.pool), self._seals.seal(asked.job), timeout_s)

    def _may_cache(self, tenant: str) -> bool:
        """Return False if the tenant's data is encrypted, or its settings are unknown: plaintext must not be
        cached."""
        return not self._seals.sealed(tenant) and not self._tenants.doubtful(tenant)
