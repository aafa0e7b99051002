"""Which worker should hold which version, and which workers answer for it. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tether.model import Assignment, Heartbeat, ModelRef, Route


@dataclass(frozen=True)
class Seen:
    """A worker's last heartbeat and when it arrived, in this process's monotonic seconds."""

    heartbeat: Heartbeat
    at: float


def alive(workers: Mapping[str, Seen], now: float, timeout_s: float) -> dict[str, Heartbeat]:
    """Workers heard of within ``timeout_s``, by the time of receipt: a worker's own clock does not count."""
    return {name: seen.heartbeat for name, seen in workers.items() if now - seen.at <= timeout_s}


def assignments(epochs: Mapping[str, int], models: Iterable[ModelRef]) -> dict[str, Assignment]:
    """Every registered worker holds every ready version."""
    wanted = tuple(sorted(models, key=lambda ref: (ref.model, ref.version)))
    return {worker: Assignment(worker, epoch, wanted) for worker, epoch in epochs.items()}


def routes(living: Mapping[str, Heartbeat], models: Iterable[ModelRef]) -> dict[ModelRef, Route]:
    """For every version the workers that said they hold it; a version nobody holds has a route without workers."""
    found: dict[ModelRef, Route] = {}
    for ref in models:
        holders = sorted(name for name, beat in living.items() if ref in beat.ready)
        regions = tuple(sorted({living[name].region for name in holders})) or ("local",)
        found[ref] = Route(ref.model, ref.version, tuple(holders), regions)
    return found
