"""What other installed packages bring, by entry point: architectures of PyTorch, and whole runtimes.

Such a package is installed by whoever runs the platform, so its code is trusted as the platform's own is. It is only ever
imported in the process of a model, never in a service's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tether.errors import ModelRejected

ARCHITECTURES = "tether.architectures"
"""Names of architectures -> ``build(config)``, which returns a ``torch.nn.Module`` without weights that matter."""

RUNTIMES = "tether.runtimes"
"""Platforms -> an object with ``load(directory, *, threads, device)``, which returns a :class:`tether.ports.Runtime` that
also has the model's ``inputs`` and ``outputs``, each a tuple of :class:`tether.model.TensorSpec`."""


@functools.cache
def installed(group: str) -> Mapping[str, EntryPoint]:
    """What there is, by name; packages that come later are seen by the next process. Of two of one name neither counts."""
    found = list(entry_points(group=group))
    names = [point.name for point in found]
    return {point.name: point for point in found if names.count(point.name) == 1}


def load(group: str, name: str, what: str, field: str) -> Any:
    """The object behind a name; imports the package that brings it.

    Raises:
        ModelRejected: no package here brings it, or two do, or it cannot be imported.
    """
    point = installed(group).get(name)
    if point is None:
        known = ", ".join(f"'{other}'" for other in sorted(installed(group))) or "none"
        raise ModelRejected(
            f"there is no {what} '{name[:64]}' here (known: {known}); install one package that has it as an entry point "
            f"of '{group}', where the model store runs and where the workers do",
            field=field,
        )
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ModelRejected(
            f"the {what} '{name[:64]}' cannot be imported from '{point.value}': {error}", field=field
        ) from error
