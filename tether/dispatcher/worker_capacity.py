"""What the least able worker can do of each version whose jobs are shared by capacity: the measure of all the others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tether.dispatcher.assignments import Place
from tether.domain.job import SHARED
from tether.domain.manifest import Heartbeat

_STEADY = 1.2
"""By what factor a level must have changed before workers are told again."""


class CapacityBaseline:
    """Remembers what was told, so that small changes are not."""

    def __init__(self) -> None:
        self._told: dict[Place, float] = {}

    def least(self, living: Mapping[str, Heartbeat], pools: Mapping[str, str]) -> Mapping[Place, float]:
        """By version and pool, from the newest heartbeats; ``pools`` says which worker is whose."""
        found: dict[Place, float] = {}
        for worker, beat in living.items():
            if pools.get(worker, SHARED) != beat.pool:
                continue
            for ref, level in beat.levels:
                if math.isfinite(level) and level > 0 and ref in beat.ready:
                    place = beat.pool, ref
                    found[place] = min(level, found.get(place, math.inf))
        self._told = {place: self._kept(place, level) for place, level in found.items()}
        return self._told

    def _kept(self, place: Place, level: float) -> float:
        told = self._told.get(place)
        return told if told is not None and told / _STEADY < level < told * _STEADY else level
