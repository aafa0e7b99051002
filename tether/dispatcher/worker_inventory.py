"""Tracks the workers available for placement, and their last assignments."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tether.dispatcher.assignments import Models, Place
from tether.dispatcher.placement import Placement, PlacementInput, WorkerOffer, place
from tether.domain.job import SHARED
from tether.domain.manifest import Assignment, Heartbeat, Manifest, ModelRef, Registration
from tether.model.config import ModelConfig
from tether.process import metrics

log = logging.getLogger(__name__)

FAILING_S = 60.0
"""Seconds that a worker ranks last for a version it could not load; the cause may be gone by then."""


class WorkerInventory:
    """Remembers workers' offers. A worker counts until it was silent for ``timeout_s``."""

    def __init__(self, timeout_s: float, most_copies: int) -> None:
        self._timeout_s = timeout_s
        self._most_copies = most_copies
        self._said: dict[str, tuple[Registration | Heartbeat, float]] = {}
        self._sizes: dict[ModelRef, int] = {}
        self._failed_at: dict[tuple[str, ModelRef], float] = {}
        """When a worker last reported that it cannot load a version."""
        self._last: tuple[object, Placement] | None = None
        """The last input and its placement: usually nothing has changed."""
        self.reasons: dict[Place, str] = {}
        """Why versions are on fewer workers than they should be, by the last placement."""

    def record(self, worker: str, what: Registration | Heartbeat, now: float) -> None:
        self._said[worker] = (what, now)
        if isinstance(what, Heartbeat):
            for name, _ in what.failed:
                model, _, version = name.rpartition(":")
                if (
                    version.isdecimal()
                    and len(version) < 10
                    and (ref := ModelRef(model, int(version))) not in what.ready
                ):
                    self._failed_at[worker, ref] = now
            for ref in what.ready:
                self._failed_at.pop((worker, ref), None)

    def version(self, manifest: Manifest) -> None:
        """Record the size of a version."""
        self._sizes[ModelRef(manifest.name, manifest.version)] = manifest.size

    def place(
        self,
        models: Models,
        *,
        pools: Mapping[str, str],
        assigned: Mapping[str, Assignment],
        living: Mapping[str, Heartbeat],
        configs: Mapping[str, ModelConfig],
        now: float,
        listening: bool,
    ) -> dict[str, tuple[ModelRef, ...]]:
        """Return what every counting worker should host; others keep their assignments.

        ``listening``: not all workers had time for a heartbeat yet, so existing assignments stay.
        """
        offers = {
            worker: WorkerOffer(pools.get(worker, SHARED), what.labels, what.memory)
            for worker, (what, at) in self._said.items()
            if now - at <= self._timeout_s
        }
        beats = {worker: beat.ready for worker, beat in living.items() if beat.pool == pools.get(worker, SHARED)}
        kept = _holders(assigned) if listening and assigned.keys() - offers.keys() else {}
        failing = self._failing(pools, now)
        question = (dict(models), offers, dict(configs), beats, kept, dict(self._sizes), failing)
        if self._last is None or self._last[0] != question:
            ready = _ready(beats, offers)
            found = place(models, offers, PlacementInput(self._sizes, configs, ready, self._most_copies, kept, failing))
            self._last = (question, found)
            self._log_changes(found)
        return self._last[1].held

    def _failing(self, pools: Mapping[str, str], now: float) -> dict[Place, set[str]]:
        self._failed_at = {key: at for key, at in self._failed_at.items() if now - at < FAILING_S}
        found: dict[Place, set[str]] = {}
        for worker, ref in self._failed_at:
            found.setdefault((pools.get(worker, SHARED), ref), set()).add(worker)
        return found

    def _log_changes(self, found: Placement) -> None:
        for (pool, ref), reason in found.reasons.items():
            if self.reasons.get((pool, ref)) != reason:
                fields = {"action": "not_placed", "model": ref.model, "version": ref.version, "tenant": pool}
                log.warning("%s:%d: %s", ref.model, ref.version, reason, extra=fields)
        self.reasons = found.reasons
        metrics.VERSIONS_UNPLACED.set(len(found.reasons))


def _ready(beats: Mapping[str, tuple[ModelRef, ...]], offers: Mapping[str, WorkerOffer]) -> dict[Place, set[str]]:
    found: dict[Place, set[str]] = {}
    for worker, refs in beats.items():
        if worker in offers:
            for ref in refs:
                found.setdefault((offers[worker].pool, ref), set()).add(worker)
    return found


def _holders(assigned: Mapping[str, Assignment]) -> dict[Place, set[str]]:
    found: dict[Place, set[str]] = {}
    for worker, assignment in assigned.items():
        for ref in assignment.models:
            found.setdefault((assignment.pool, ref), set()).add(worker)
    return found
