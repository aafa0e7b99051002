"""Loads plugins of other installed packages by entry point: PyTorch architectures, and whole runtimes.

The operator of the platform installs such a package, so its code is trusted like the platform's own. It is
imported only in the process of a model, never in a service's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array
from tether.errors import ModelRejected, OutputMisfit

ARCHITECTURES = "tether.architectures"
"""Names of architectures -> ``build(config)``, which returns a ``torch.nn.Module`` with any weights."""

RUNTIMES = "tether.runtimes"
"""Platforms -> an object with ``load(directory, *, threads, device)``, which returns a :class:`tether.frameworks.runtime.Runtime` that
also has the model's ``inputs`` and ``outputs``, each a tuple of :class:`tether.domain.manifest.TensorSpec`."""


@functools.cache
def installed(group: str) -> Mapping[str, EntryPoint]:
    """Return installed plugins by name; later packages are seen by the next process. A name used twice is left out."""
    found = list(entry_points(group=group))
    names = [point.name for point in found]
    return {point.name: point for point in found if names.count(point.name) == 1}


def load(group: str, name: str, what: str, field: str) -> Any:
    """Load the object of a name; imports its package.

    Raises:
        ModelRejected: no package here has it, or two do, or it cannot be imported.
    """
    point = installed(group).get(name)
    if point is None:
        known = ", ".join(f"'{other}'" for other in sorted(installed(group))) or "none"
        raise ModelRejected(
            f"unknown {what} '{name[:64]}' (known: {known}); install one package that has it as an entry point "
            f"of '{group}', where the model store runs and where the workers do",
            field=field,
        )
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        words = " ".join(word for word in str(error).split() if "/" not in word)
        raise ModelRejected(
            f"the {what} '{name[:64]}' cannot be imported from '{point.value}': {words[:200]}", field=field
        ) from error


class Checked:
    """A model of a plugin's runtime; its outputs are checked against its signature (see
    :class:`tether.frameworks.runtime.Runtime`).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.inputs = _specs(model, "inputs")
        self.outputs = _specs(model, "outputs")
        if not self.outputs or not callable(getattr(model, "run", None)):
            raise ModelRejected("the runtime's model needs outputs and run(inputs, outputs)", field="platform")
        self._specs = {spec.name: spec for spec in self.outputs}

    @property
    def output_names(self) -> Sequence[str]:
        return tuple(self._specs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names the requested outputs, empty for all in the model's order.

        Raises:
            OutputMisfit: the outputs do not match the model's signature.
        """
        wanted = tuple(outputs or self._specs)
        found = list(self._model.run(dict(inputs), wanted))
        if len(found) != len(wanted):
            raise OutputMisfit(f"the runtime returned {len(found)} arrays, {len(wanted)} were requested")
        return [_fitting(self._specs[name], array) for name, array in zip(wanted, found, strict=True)]

    def close(self) -> None:
        self._model.close()


def _specs(model: Any, side: str) -> tuple[TensorSpec, ...]:
    specs = tuple(getattr(model, side, ()))
    for spec in specs:
        if not isinstance(spec, TensorSpec) or (spec.datatype != "BYTES" and spec.datatype not in NUMPY_DTYPES):
            raise ModelRejected(
                f"the runtime's model needs {side} that are TensorSpec, with datatypes of the protocol",
                field="platform",
            )
    return specs


def _fitting(spec: TensorSpec, found: Any) -> Array:
    array = np.asarray(found)
    dtype = np.dtype(np.object_) if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype]
    fits = len(array.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        raise OutputMisfit(
            f"output '{spec.name}' is {array.dtype} of shape {list(array.shape)}; "
            f"the signature says {spec.datatype} of {list(spec.shape)}"
        )
    return array
