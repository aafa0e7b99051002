"""Computes which worker hosts which version, and the routes to those that do. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from tether.domain.job import SHARED
from tether.domain.manifest import NO_FINDING, Assignment, Finding, Heartbeat, ModelRef, Route
from tether.domain.worker_protocol import EndedLanes

Place = tuple[str, ModelRef]
"""A pool and a version."""

Models = Mapping[str, tuple[ModelRef, ...]]
"""The versions that each served pool may use."""


class LaneGroup(NamedTuple):
    """The lanes of a version in one region and pool."""

    pool: str
    ref: ModelRef
    region: str


@dataclass(frozen=True)
class LastHeartbeat:
    """A worker's last heartbeat and its arrival in this process's monotonic seconds."""

    heartbeat: Heartbeat
    at: float


def alive(workers: Mapping[str, LastHeartbeat], now: float, timeout_s: float) -> dict[str, Heartbeat]:
    """Return workers with a heartbeat received within ``timeout_s``; the worker's own clock does not matter."""
    return {name: seen.heartbeat for name, seen in workers.items() if now - seen.at <= timeout_s}


def assignments(
    epochs: Mapping[str, int],
    pools: Mapping[str, str],
    held: Mapping[str, tuple[ModelRef, ...]],
    ended: Mapping[str, tuple[EndedLanes, ...]] = MappingProxyType({}),
    revisions: Mapping[str, int] = MappingProxyType({}),
    *,
    levels: Mapping[Place, float] = MappingProxyType({}),
    findings: Mapping[Place, Finding] = MappingProxyType({}),
    streams: str = "",
) -> dict[str, Assignment]:
    """Return the assignment of each worker in ``held``, for its epoch.

    ``pools``: the pool of each worker; ``ended``: lanes of deleted versions to drain; ``revisions``: current
    configuration revisions; ``levels``: capacity of the least able worker; ``findings``: findings on
    versions; ``streams``: creation times of infer streams.
    """
    found: dict[str, Assignment] = {}
    for worker, refs in held.items():
        pool = pools.get(worker, SHARED)
        counting = tuple(
            (model, revisions[model]) for model in sorted({ref.model for ref in refs}) if model in revisions
        )
        least = tuple((ref, levels[pool, ref]) for ref in refs if (pool, ref) in levels)
        known = tuple((ref, findings[pool, ref]) for ref in refs if (pool, ref) in findings)
        found[worker] = Assignment(
            worker, epochs[worker], refs, pool, ended.get(worker, ()), counting, least, known, streams
        )
    return found


def working_off(
    groups: Mapping[LaneGroup, int], living: Mapping[str, Heartbeat], pools: Mapping[str, str]
) -> dict[str, tuple[EndedLanes, ...]]:
    """Choose for each group of deleted lanes a live worker of its pool, in its region if there is one.

    ``groups`` has the number of workers tried before.
    """
    found: dict[str, list[EndedLanes]] = {}
    for (pool, ref, region), turn in groups.items():
        own = [name for name, beat in living.items() if pools.get(name, SHARED) == beat.pool == pool]
        near = [name for name in own if living[name].region == region]
        if own:
            ranked = sorted(near or own, key=lambda name: rendezvous(name, f"{ref.model}:{ref.version}"), reverse=True)
            found.setdefault(ranked[turn % len(ranked)], []).append(EndedLanes(ref.model, ref.version, region))
    return {worker: tuple(lanes) for worker, lanes in found.items()}


@lru_cache(maxsize=1 << 17)
def rendezvous(worker: str, what: str) -> bytes:
    """Return the rank of a worker for ``what``; the highest wins. One worker's change moves its share only.

    Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998.
    """
    return hashlib.blake2b(f"{worker}\0{what}".encode(), digest_size=8).digest()


def routes(
    living: Mapping[str, Heartbeat],
    pools: Mapping[str, str],
    models: Models,
    reasons: Mapping[Place, str] = MappingProxyType({}),
    findings: Mapping[Place, Finding] = MappingProxyType({}),
) -> dict[Place, Route]:
    """Return the route of every version in every pool: the workers whose heartbeats list it, possibly none.

    A worker that serves other lanes than those of its own pool is in no route.
    """
    found: dict[Place, Route] = {}
    for pool, refs in models.items():
        own = {name: beat for name, beat in living.items() if pools.get(name, SHARED) == beat.pool == pool}
        for ref in refs:
            holders = sorted(name for name, beat in own.items() if ref in beat.ready)
            regions = tuple(sorted({own[name].region for name in holders})) or ("local",)
            why, known = reasons.get((pool, ref), ""), findings.get((pool, ref), NO_FINDING)
            found[pool, ref] = Route(ref.model, ref.version, tuple(holders), regions, pool, why, known)
    for beat in living.values():
        for ref, job_s in beat.paces:
            route = found.get((beat.pool, ref))
            if route is not None and beat.worker in route.workers and job_s > route.job_s:
                found[beat.pool, ref] = msgspec.structs.replace(route, job_s=job_s)
    return found


def steady(route: Route, before: Route | None) -> Route:
    """Return the route; keep its previous job time unless that doubled or halved, to save writes."""
    old = 0.0 if before is None else before.job_s
    if old and (not route.job_s or old / 2 < route.job_s < old * 2):
        return msgspec.structs.replace(route, job_s=old)
    return route
