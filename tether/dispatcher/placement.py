"""Chooses workers for versions by labels, memory and replicas. Pure, and the same in every dispatcher.

Each version ranks the workers by :func:`~tether.dispatcher.assignments.rendezvous`, so that a worker that
joins or leaves moves only its share. Memory is file bytes times instances; a lazily loaded version must fit,
but reserves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from tether.dispatcher.assignments import Models, Place, rendezvous
from tether.domain.manifest import ModelRef
from tether.model.config import Loading, ModelConfig, default_config

_MB = 1 << 20


class WorkerOffer(NamedTuple):
    """A worker's pool, labels and bytes for models (0: unlimited)."""

    pool: str
    labels: Mapping[str, str] = {}
    memory: int = 0


@dataclass(frozen=True)
class PlacementInput:
    """Versions' file bytes, configurations by model, and the workers that are ready for them."""

    sizes: Mapping[ModelRef, int] = field(default_factory=dict)
    configs: Mapping[str, ModelConfig] = field(default_factory=dict)
    ready: Mapping[Place, AbstractSet[str]] = field(default_factory=dict)
    most_copies: int = 64
    kept: Mapping[Place, AbstractSet[str]] = field(default_factory=dict)
    """Current workers of versions with replicas, which stay while not all workers have sent a heartbeat."""

    failing: Mapping[Place, AbstractSet[str]] = field(default_factory=dict)
    """Workers that recently failed to load a version: chosen only if others do not suffice."""

    def config(self, ref: ModelRef) -> ModelConfig:
        return self.configs.get(ref.model) or default_config(ref.model)

    def bytes(self, ref: ModelRef) -> int:
        return self.sizes.get(ref, 0) * min(self.config(ref).instances, self.most_copies)


@dataclass(frozen=True)
class Placement:
    """The versions of every worker, and why a version is not where it should be."""

    held: dict[str, tuple[ModelRef, ...]]
    reasons: dict[Place, str]


def place(models: Models, offers: Mapping[str, WorkerOffer], known: PlacementInput) -> Placement:
    """Distribute the versions of every pool over its workers.

    Versions with ``replicas_min`` choose first, then pinned ones, then versions already hosted, then newer
    before older ones. A worker that is no longer chosen keeps a version until the chosen ones are ready.
    """
    held: dict[str, set[ModelRef]] = {worker: set() for worker in offers}
    reasons: dict[Place, str] = {}
    for pool, refs in models.items():
        own = {worker: offer for worker, offer in offers.items() if offer.pool == pool}
        if not own:
            continue
        chosen, why = _Pool(pool, own, known).chosen(refs)
        reasons.update({(pool, ref): text for ref, text in why.items()})
        for ref, workers in chosen.items():
            for worker in workers | _meanwhile(workers, known.ready.get((pool, ref), frozenset()) & own.keys()):
                held[worker].add(ref)
    order = {pool: {ref: at for at, ref in enumerate(refs)} for pool, refs in models.items()}
    return Placement(
        {
            worker: tuple(sorted(refs, key=order.get(offers[worker].pool, {}).__getitem__))
            for worker, refs in held.items()
        },
        reasons,
    )


def _meanwhile(chosen: AbstractSet[str], ready: AbstractSet[str]) -> AbstractSet[str]:
    """Return the workers that also serve until all chosen ones do."""
    return frozenset(sorted(ready - chosen)[: len(chosen - ready)])


class _Pool:
    """The workers of one pool while versions are assigned to them."""

    def __init__(self, pool: str, offers: Mapping[str, WorkerOffer], known: PlacementInput) -> None:
        self._pool = pool
        self._offers = offers
        self._known = known
        self._used = dict.fromkeys(offers, 0)
        self._chosen: dict[ModelRef, set[str]] = {}

    def chosen(self, refs: Sequence[ModelRef]) -> tuple[dict[ModelRef, set[str]], dict[ModelRef, str]]:
        ranked = sorted(refs, key=self._rank)
        for ref in ranked:
            self._give(ref, self._known.config(ref).replicas_min)
        for ref in ranked:
            config = self._known.config(ref)
            self._give(ref, config.replicas_max or len(self._offers))
        why = {ref: self._why(ref) for ref in ranked}
        return self._chosen, {ref: text for ref, text in why.items() if text}

    def _rank(self, ref: ModelRef) -> tuple[bool, bool, bool, str, int]:
        config = self._known.config(ref)
        held = bool(self._known.ready.get((self._pool, ref)))
        return (not config.replicas_min, not config.pinned, not held, ref.model, -ref.version)

    def _give(self, ref: ModelRef, count: int) -> None:
        """Assign a version to more workers until it has ``count``."""
        chosen = self._chosen.setdefault(ref, set())
        if self._stays(ref):
            chosen |= self._known.kept[self._pool, ref] & self._offers.keys()
            return
        name = f"{ref.model}:{ref.version}"
        every = count >= len(self._offers)
        failing = self._known.failing.get((self._pool, ref), frozenset())
        ranked = (
            self._offers
            if every
            else sorted(self._offers, key=lambda one: (one not in failing, rendezvous(one, name)), reverse=True)
        )
        for worker in ranked:
            if len(chosen) >= count:
                return
            if worker not in chosen and self._may(worker, ref) and self._fits(worker, ref):
                chosen.add(worker)
                self._used[worker] += self._reserved(ref)

    def _stays(self, ref: ModelRef) -> bool:
        return bool(self._known.config(ref).replicas_max) and (self._pool, ref) in self._known.kept

    def _may(self, worker: str, ref: ModelRef) -> bool:
        wanted = self._known.config(ref).labels
        return all(self._offers[worker].labels.get(name) == value for name, value in wanted.items())

    def _fits(self, worker: str, ref: ModelRef) -> bool:
        memory = self._offers[worker].memory
        used = self._used[worker] if self._reserved(ref) else 0
        return not memory or used + self._known.bytes(ref) <= memory

    def _reserved(self, ref: ModelRef) -> int:
        config = self._known.config(ref)
        return 0 if config.loading is Loading.LAZY and not config.pinned else self._known.bytes(ref)

    def _why(self, ref: ModelRef) -> str:
        """Return why a version has fewer workers than it should; empty if it has enough."""
        config, chosen = self._known.config(ref), self._chosen[ref]
        if self._stays(ref) or (chosen and len(chosen) >= config.replicas_min):
            return ""
        labelled = [worker for worker in self._offers if self._may(worker, ref)]
        wanted = ", ".join(f"{name}={value}" for name, value in sorted(config.labels.items()))
        if not labelled:
            return f"no worker has the labels {wanted}; start one with them in 'worker_labels'"
        if chosen:
            return f"{len(chosen)} of the {config.replicas_min} workers that replicas_min requires have memory for it"
        return (
            f"need {-(-self._known.bytes(ref) // _MB)} MiB, and no worker that may host it has as much left of its "
            f"worker_memory_mb; raise that, set loading to 'lazy', or start another worker"
        )
