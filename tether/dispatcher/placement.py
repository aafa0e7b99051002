"""Which worker should hold which version, and which workers answer for it. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tether.job import SHARED
from tether.model import Assignment, Heartbeat, ModelRef, Route

Place = tuple[str, ModelRef]
"""A scope and a version."""

Models = Mapping[str, tuple[ModelRef, ...]]
"""For each scope that is served the versions it may use."""


@dataclass(frozen=True)
class Seen:
    """A worker's last heartbeat and when it arrived, in this process's monotonic seconds."""

    heartbeat: Heartbeat
    at: float


def alive(workers: Mapping[str, Seen], now: float, timeout_s: float) -> dict[str, Heartbeat]:
    """Workers heard of within ``timeout_s``, by the time of receipt: a worker's own clock does not count."""
    return {name: seen.heartbeat for name, seen in workers.items() if now - seen.at <= timeout_s}


def assignments(epochs: Mapping[str, int], scopes: Mapping[str, str], models: Models) -> dict[str, Assignment]:
    """Every registered worker holds every version of its scope; ``scopes`` says which worker is whose."""
    found: dict[str, Assignment] = {}
    for worker, epoch in epochs.items():
        scope = scopes.get(worker, SHARED)
        found[worker] = Assignment(worker, epoch, models.get(scope, ()), scope)
    return found


def routes(living: Mapping[str, Heartbeat], scopes: Mapping[str, str], models: Models) -> dict[Place, Route]:
    """For every version of every scope its workers that said they hold it; a version nobody holds has a route without
    workers. A worker that serves other lanes than those it is entitled to is in none."""
    found: dict[Place, Route] = {}
    for scope, refs in models.items():
        own = {name: beat for name, beat in living.items() if scopes.get(name, SHARED) == beat.scope == scope}
        for ref in refs:
            holders = sorted(name for name, beat in own.items() if ref in beat.ready)
            regions = tuple(sorted({own[name].region for name in holders})) or ("local",)
            found[scope, ref] = Route(ref.model, ref.version, tuple(holders), regions, scope)
    return found
