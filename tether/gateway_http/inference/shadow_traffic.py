"""Mirrors requests to shadow versions after the caller is answered, compares the outputs and counts the
results.

Mirrored requests use a bundler of their own, so they take no place in the queues, bundles and counts of
callers. They are neither audited nor rate limited, and a busy gateway drops them first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import TenantSeals
from tether.domain.job import Job, new_job_id
from tether.domain.manifest import check_outputs
from tether.errors import TetherError
from tether.gateway_http.bundling.infer_bundler import InferBundler
from tether.gateway_http.bundling.pending_request import Answer
from tether.gateway_http.inference.output_comparison import Comparison, Verdict, compare
from tether.gateway_http.inference.request_plan import AdmittedRequest
from tether.gateway_http.models.catalog import Catalog, ResolvedVersion
from tether.model.config import Shadow
from tether.process import metrics
from tether.process.lifecycle import Tasks

log = logging.getLogger(__name__)

_MOST_BYTES = 64 << 20
"""Limit of inputs and outputs of mirrored requests in flight."""

_INLINE_BYTES = 64 << 10
"""Larger outputs are compared in a thread, to keep the event loop free for callers."""


@dataclass
class ShadowStats:
    """Results of one shadow since ``since`` (UTC seconds); ``last_error`` is an error's code."""

    since: float
    counts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    largest_difference: float = 0.0
    last_error: str = ""


class Shadows:
    """Statistics of every model's shadows, and mirrored requests in flight.

    ``callers`` is the bundler of callers' requests; ``bundler`` is for mirrored ones only.
    """

    def __init__(
        self,
        bus: Bus,
        tasks: Tasks,
        catalog: Catalog,
        seals: TenantSeals,
        *,
        callers: InferBundler,
        bundler: InferBundler,
    ) -> None:
        self._bus = bus
        self._tasks = tasks
        self._catalog = catalog
        self._seals = seals
        self._callers = callers
        self._bundler = bundler
        self._most = bus.settings.shadow_inflight
        self._tallies: dict[str, dict[Shadow, ShadowStats]] = {}
        self._bytes = 0
        self.under_way = 0

    async def start(self) -> None:
        await self._bundler.start()

    def follow(self, model: str, shadows: tuple[Shadow, ...]) -> tuple[Shadow, ...]:
        """Set a model's shadows and return the active ones. A shadow that stays keeps its statistics."""
        known, now = self._tallies.pop(model, {}), self._bus.clock.utc()
        if shadows:
            self._tallies[model] = {shadow: known.get(shadow) or ShadowStats(now) for shadow in shadows}
        return tuple(shadow for shadow in self._tallies.get(model, ()) if shadow.percent > 0 and self._most > 0)

    def tallies(self, model: str) -> dict[Shadow, ShadowStats]:
        """Return a model's shadows with their statistics at this gateway."""
        return self._tallies.get(model, {})

    def mirror(self, asked: AdmittedRequest, answer: Answer) -> None:
        """Mirror an answered request. Never blocks, never fails."""
        for shadow in asked.plan.shadows:
            if shadow.alias and shadow.alias != asked.alias:
                continue
            if shadow.version == asked.served.manifest.version:
                continue
            if shadow.percent >= 100 or random.random() * 100 < shadow.percent:  # noqa: S311 - a sample, not a secret
                self._mirror_to(asked, shadow, answer)

    def _mirror_to(self, asked: AdmittedRequest, shadow: Shadow, answer: Answer) -> None:
        served = self._catalog.find(asked.served.manifest.name, shadow.version)
        if served is None or not self._catalog.workers(served, asked.pool):
            self._count(asked, shadow, Verdict.UNAVAILABLE)
            return
        size = sum([len(tensor.data) for tensor in (*asked.job.inputs, *answer)])
        if self._busy(size):
            self._count(asked, shadow, Verdict.DROPPED)
            return
        self.under_way += 1
        self._bytes += size
        self._tasks.spawn(self._mirror_and_compare(asked, shadow, served, answer, size), "shadow")

    def _busy(self, size: int) -> bool:
        if self.under_way >= self._most or self._bytes + size > _MOST_BYTES or not self._bus.connected:
            return True
        return self._callers.held * 2 > self._bus.settings.max_inflight

    async def _mirror_and_compare(
        self, asked: AdmittedRequest, shadow: Shadow, served: ResolvedVersion, answer: Answer, size: int
    ) -> None:
        try:
            found = await self._run_and_compare(asked, served, answer)
            self._count(asked, shadow, found.verdict, difference=found.difference)
        except TetherError as error:
            self._count(asked, shadow, Verdict.ERROR, code=error.code)
        finally:
            self.under_way -= 1
            self._bytes -= size

    async def _run_and_compare(self, asked: AdmittedRequest, served: ResolvedVersion, answer: Answer) -> Comparison:
        wanted = tuple([tensor.name for tensor in answer])
        self._catalog.check_inputs(served, asked.job.inputs, asked.pool)
        check_outputs(served.manifest, wanted)
        timeout_s = self._bus.settings.request_timeout_s
        deadline = self._bus.clock.utc() + timeout_s
        job = Job(new_job_id(), asked.job.tenant, asked.job.inputs, deadline, wanted)
        other = await self._bundler.submit(served.lane(asked.pool), self._seals.seal(job), timeout_s)
        if sum([len(tensor.data) for tensor in answer]) <= _INLINE_BYTES:
            return compare(answer, other)
        return await asyncio.to_thread(compare, answer, other)

    def _count(
        self, asked: AdmittedRequest, shadow: Shadow, verdict: Verdict, *, difference: float = 0.0, code: str = ""
    ) -> None:
        model = asked.served.manifest.name
        metrics.SHADOWS.labels(model, str(shadow.version), verdict.value).inc()
        tally = self._tallies.get(model, {}).get(shadow)
        if tally is None:
            return
        tally.counts[verdict] += 1
        tally.largest_difference = max(tally.largest_difference, difference)
        tally.last_error = code or tally.last_error
        if verdict is Verdict.DIFFERENT and tally.counts[verdict] == 1:
            log.info(
                "shadow version %d of model '%s' gave other outputs than version %d",
                shadow.version, model, asked.served.manifest.version,
                extra={"action": "shadow_differs", "model": model},
            )  # fmt: skip
