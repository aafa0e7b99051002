"""What a model's configuration adds to the way of its requests. Models without such a configuration have no plan, and their
requests do not come here."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from functools import partial

from tether import metrics
from tether.bus.connection import Bus
from tether.bus.tenant_keys import TenantSeals
from tether.gateway_http.bundler import Answer, InferBundler
from tether.gateway_http.catalog import Catalog, Served
from tether.gateway_http.kept_answers import HIT, MISS, KeptAnswers
from tether.gateway_http.request import Headers
from tether.gateway_http.response_cache import Question, ResponseCache, digest_of
from tether.gateway_http.tenants import Tenants
from tether.job import Job


@dataclass(frozen=True)
class Plan:
    """What is to be done for a model's requests. Every change of its configuration or versions makes another one."""

    generation: int
    cache_ttl_s: float


@dataclass(frozen=True)
class Asked:
    """One synchronous request that was let in, checked and resolved."""

    plan: Plan
    served: Served
    scope: str
    job: Job
    timeout_s: float


class Extras:
    """The plans of all models, and the way of requests that have one."""

    def __init__(self, bus: Bus, catalog: Catalog, tenants: Tenants, seals: TenantSeals, bundler: InferBundler) -> None:
        settings = bus.settings
        self._catalog = catalog
        self._tenants = tenants
        self._seals = seals
        self._bundler = bundler
        self._generations = itertools.count(1)
        self._caching = settings.response_cache_mb > 0
        cache = ResponseCache(settings.response_cache_mb << 20, bus.clock.monotonic)
        self.kept = KeptAnswers(cache, bus.clock.monotonic, settings.max_inflight)
        self.plans: dict[str, Plan] = {}
        metrics.CACHE_BYTES.set_function(lambda: cache.size)
        catalog.on_change(self._model_changed)
        tenants.on_change(cache.drop_tenant)

    def _model_changed(self, model: str) -> None:
        had = self.plans.pop(model, None)
        if had is not None and had.cache_ttl_s:
            self.kept.cache.drop_model(model)
        config = self._catalog.config(model)
        ttl_s = config.cache_ttl_s if self._caching else 0.0
        if ttl_s:
            self.plans[model] = Plan(next(self._generations), ttl_s)

    async def answer(self, asked: Asked, notes: Headers) -> tuple[Answer, str]:
        """Outputs, and the id of the job that this request was; empty when its answer was there already.

        ``notes`` gets the headers that the caller is told.

        Raises:
            TetherError: as :meth:`InferBundler.submit` and its future.
        """
        if not asked.plan.cache_ttl_s or not self._may_keep(asked.job.tenant):
            return await self._sent(asked, asked.timeout_s), asked.job.id
        plan, manifest, tenant = asked.plan, asked.served.manifest, asked.job.tenant
        digest = digest_of(asked.job, asked.scope, manifest.name, manifest.version, plan.generation)
        question = Question(tenant, manifest.name, digest, asked.timeout_s, plan.cache_ttl_s)
        answer, hit = await self.kept.answer(
            question,
            partial(self._sent, asked),
            lambda: self.plans.get(manifest.name) is plan and self._may_keep(tenant),
        )
        notes.append(HIT if hit else MISS)
        return answer, "" if hit else asked.job.id

    def _sent(self, asked: Asked, timeout_s: float) -> asyncio.Future[Answer]:
        return self._bundler.submit(asked.served.lane(asked.scope), self._seals.seal(asked.job), timeout_s)

    def _may_keep(self, tenant: str) -> bool:
        """What a sealed tenant was answered is kept nowhere in the open, nor of one of whom nobody knows whether it is."""
        return not self._seals.sealed(tenant) and not self._tenants.doubtful(tenant)
