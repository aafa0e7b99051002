"""Lowest worker capacity per version; capacity load balancing is relative to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tether.dispatcher.assignments import Place
from tether.domain.job import SHARED
from tether.domain.manifest import Heartbeat

_STEADY = 1.2
"""Factor by which a level must change before workers are notified."""


class CapacityBaseline:
    """Remembers the published levels, to suppress small changes."""

    def __init__(self) -> None:
        self._published: dict[Place, float] = {}

    def least(self, living: Mapping[str, Heartbeat], pools: Mapping[str, str]) -> Mapping[Place, float]:
        """Return the lowest level by version and pool; ``pools`` has each worker's pool."""
        found: dict[Place, float] = {}
        for worker, beat in living.items():
            if pools.get(worker, SHARED) != beat.pool:
                continue
            for ref, level in beat.levels:
                if math.isfinite(level) and level > 0 and ref in beat.ready:
                    place = beat.pool, ref
                    found[place] = min(level, found.get(place, math.inf))
        self._published = {place: self._kept(place, level) for place, level in found.items()}
        return self._published

    def _kept(self, place: Place, level: float) -> float:
        published = self._published.get(place)
        return published if published is not None and published / _STEADY < level < published * _STEADY else level
