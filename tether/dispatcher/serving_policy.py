"""Selects the versions that workers should host. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tether.dispatcher.assignments import Models, Place
from tether.domain.manifest import Alias, ModelRef, Route
from tether.model.config import ModelConfig, default_config
from tether.model.version_policy import served_versions

LINGER_S = 2.0
"""Seconds that an unserved version is kept, so that gateways learn of it and requests finish."""


class RecentlyServed:
    """Remembers recently wanted versions."""

    def __init__(self) -> None:
        self._last: dict[Place, float] = {}

    def lingering(self, wanted: Models, models: Models, now: float) -> Models:
        """Return ``wanted`` plus what was wanted less than ``LINGER_S`` ago, in the order of ``models``."""
        self._last.update({(pool, ref): now for pool, refs in wanted.items() for ref in refs})
        self._last = {place: at for place, at in self._last.items() if now - at < LINGER_S}
        return {pool: tuple(ref for ref in refs if (pool, ref) in self._last) for pool, refs in models.items()}


def served(
    models: Models,
    configs: Mapping[str, ModelConfig],
    aliases: Mapping[str, Collection[Alias]],
    routes: Mapping[Place, Route],
) -> Models:
    """Return the versions to host by pool; ``configs`` and ``aliases`` are by model."""
    found: dict[str, tuple[ModelRef, ...]] = {}
    for pool, refs in models.items():
        kept = _served_of(pool, refs, configs, aliases, routes)
        found[pool] = tuple(ref for ref in refs if ref in kept)
    return found


def _served_of(
    pool: str,
    refs: Collection[ModelRef],
    configs: Mapping[str, ModelConfig],
    aliases: Mapping[str, Collection[Alias]],
    routes: Mapping[Place, Route],
) -> set[ModelRef]:
    versions: dict[str, list[int]] = {}
    held: dict[str, list[int]] = {}
    for ref in refs:
        versions.setdefault(ref.model, []).append(ref.version)
        route = routes.get((pool, ref))
        if route is not None and route.workers:
            held.setdefault(ref.model, []).append(ref.version)
    return {
        ModelRef(model, number)
        for model, numbers in versions.items()
        for number in served_versions(
            configs.get(model) or default_config(model), numbers, aliases.get(model, ()), held.get(model, ())
        )
    }
