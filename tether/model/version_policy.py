"""Selects the served versions of a model. Pure, and the same for the dispatcher and every gateway."""

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
    """Return the subset of ``versions`` to serve.

    None if the model is unloaded; otherwise those of its version policy, targets of aliases, and shadows.
    ``held`` are those that a worker hosts. Under a policy of the latest so many, older versions stay until
    newer ones are hosted, so that a push, even one that cannot be loaded, takes nothing away. The alias
    ``latest`` keeps no version: its target follows from the policy. ``loaded`` overrides the configuration's.
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
