"""Which versions of a model are served just now: pure, and the same for the dispatcher and every gateway."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tether.domain.manifest import LATEST, Alias
from tether.model.config import ModelConfig


def served_versions(
    config: ModelConfig,
    versions: Collection[int],
    aliases: Iterable[Alias] = (),
    held: Collection[int] = (),
    *,
    loaded: bool | None = None,
) -> frozenset[int]:
    """Those of ``versions`` that should be served: none of a model that is unloaded; otherwise those of its version
    policy, and whatever an alias stands for or a shadow names.

    ``held`` are those that a worker holds. Under a policy of the latest so many, as many older ones as fill it stay
    until the newer ones are held: a push takes nothing away, and one that cannot be loaded least of all. The alias
    ``latest`` keeps no version: what it means follows from the policy. ``loaded`` counts instead of the configuration's.
    """
    if not (config.loaded if loaded is None else loaded):
        return frozenset()
    policy = config.versions
    if policy.specific:
        found = set(policy.specific)
    elif policy.latest:
        found = {*_newest(versions, policy.latest), *_newest(set(held) & set(versions), policy.latest)}
    else:
        return frozenset(versions)
    for alias in aliases:
        if alias.name != LATEST:
            found |= alias.versions
    found.update(shadow.version for shadow in config.shadows)
    return frozenset(found.intersection(versions))


def _newest(versions: Collection[int], count: int) -> list[int]:
    return sorted(versions)[-count:]
