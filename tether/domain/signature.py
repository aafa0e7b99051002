"""What a model declares of its inputs and outputs, and whether a request fits that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tether.domain.tensor import Tensor
from tether.errors import BadTensor, ModelRejected


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model declares of one input or output; -1 in ``shape`` is an axis of any length.

    ``axes`` are the names that the model gives to such axes, one for each axis, empty where there is none; () when it names
    none. Axes of two inputs with one name have one length, unless the name has no letter or digit, as the '?' of some exporters. An
    ``optional`` input has a value of its own when a request gives none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    optional: bool = False


class Signature(Protocol):
    """A version's name, and its inputs and outputs."""

    @property
    def name(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


SERVING_DEFAULT = "serving_default"


def chosen(known: Sequence[str], wanted: str) -> str:
    """Which of a file's signatures is served: the one that is ``wanted``, else ``serving_default``, else the only one.

    Raises:
        ModelRejected: there is none such; it names those that there are.
    """
    listed = ", ".join(f"'{name[:64]}'" for name in sorted(known)[:16]) or "none"
    if wanted:
        if wanted not in known:
            raise ModelRejected(f"the model has no signature '{wanted[:64]}'; it has: {listed}", field="signature")
        return wanted
    if SERVING_DEFAULT in known:
        return SERVING_DEFAULT
    if len(known) == 1:
        return known[0]
    raise ModelRejected(
        f"the model has no signature '{SERVING_DEFAULT}', and not one alone; it has: {listed}"
        + ("; name one with --signature NAME" if known else "; save it with signatures"),
        field="signature",
    )


MOST_RUNS = 4096
"""Runs that one request may be cut into."""


def check_inputs(model: Signature, inputs: tuple[Tensor, ...], *, run_rows: int) -> None:
    """Compare a request's tensors with a version's signature. ``run_rows``: rows of one run; they must have as many rows as one
    another then, and not more than fit into ``MOST_RUNS``. 0: it is not batched.

    Raises:
        BadTensor: naming the tensor, what was sent and what is expected.
    """
    specs = {spec.name: spec for spec in model.inputs}
    named: dict[str, tuple[str, int]] = {}
    rows = -1
    for tensor in inputs:
        spec = specs.pop(tensor.name, None)
        if spec is None:
            raise _unexpected(model, inputs, tensor)
        _check_against(spec, tensor)
        if run_rows and not spec.optional:
            rows = _same_rows(tensor, rows)
        if spec.axes and len(model.inputs) > 1:
            _check_axes(spec, tensor, named)
    missing = next((name for name, spec in specs.items() if not spec.optional), None)
    if missing is not None:
        raise BadTensor(f"input '{missing}' is required by model '{model.name}' and missing", field=missing)
    if rows > run_rows * MOST_RUNS:
        raise BadTensor(
            f"the inputs have {rows} rows; model '{model.name}' takes at most {run_rows * MOST_RUNS} in one request, "
            f"which are {MOST_RUNS} runs of {run_rows}: send several requests",
            field="inputs",
        )


def gives_optional(model: Signature, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a request gives an optional input, whose first axis is no row's: it is to run whole and by itself."""
    optional = {spec.name for spec in model.inputs if spec.optional}
    return bool(optional) and any(tensor.name in optional for tensor in inputs)


def _same_rows(tensor: Tensor, rows: int) -> int:
    own = tensor.shape[0]
    if rows not in (-1, own):
        raise BadTensor(
            f"input '{tensor.name}' has {own} rows and another input has {rows}; all inputs need the same first axis",
            field=f"{tensor.name}.shape",
        )
    return own


def _check_axes(spec: TensorSpec, tensor: Tensor, named: dict[str, tuple[str, int]]) -> None:
    """Axes of one name have one length; ``named`` has those seen so far, with the input that they were seen in. Exporters give one
    name to height and width too, so axes of one input are not compared."""
    for place, (axis, length) in enumerate(zip(spec.axes, tensor.shape, strict=True)):
        other, expected = named.setdefault(axis, (tensor.name, length))
        if length != expected and other != tensor.name and any(map(str.isalnum, axis)):
            raise BadTensor(
                f"input '{tensor.name}' has {length} on axis {place} ('{axis[:64]}'), and input '{other}' has {expected} "
                "on the axis of that name; they must agree",
                field=f"{tensor.name}.shape",
            )


def _unexpected(model: Signature, inputs: tuple[Tensor, ...], tensor: Tensor) -> BadTensor:
    if sum(other.name == tensor.name for other in inputs) > 1:
        return BadTensor(f"input '{tensor.name}' is given twice", field=tensor.name)
    known = ", ".join(f"'{spec.name}'" for spec in model.inputs)
    has = f"its inputs are {known}" if known else "it has none"
    shown = tensor.name[:64]
    return BadTensor(f"model '{model.name}' has no input '{shown}'; {has}", field=shown)


def _check_against(spec: TensorSpec, tensor: Tensor) -> None:
    if tensor.datatype != spec.datatype:
        raise BadTensor(
            f"input '{spec.name}' has datatype {tensor.datatype[:32]}; the model expects {spec.datatype}",
            field=f"{spec.name}.datatype",
        )
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise BadTensor(
            f"input '{spec.name}' has shape {list(tensor.shape)}; the model expects {list(spec.shape)}"
            + (" (-1: any length)" if -1 in spec.shape else ""),
            field=f"{spec.name}.shape",
        )


def check_outputs(model: Signature, names: tuple[str, ...]) -> None:
    """Prove that every requested output is one of the model's, and asked for once.

    Raises:
        BadTensor: naming the first that is not.
    """
    known = {spec.name for spec in model.outputs}
    if len(set(names)) != len(names):
        raise BadTensor("an output is asked for twice", field="outputs")
    for name in names:
        if name not in known:
            listed = ", ".join(f"'{output}'" for output in sorted(known))
            raise BadTensor(
                f"model '{model.name}' has no output '{name[:64]}'; its outputs are {listed}", field="outputs"
            )


def metadata(model: Signature, versions: tuple[int, ...]) -> dict[str, Any]:
    """The OIP model metadata object."""
    return {
        "name": model.name,
        "versions": [str(version) for version in versions],
        "platform": model.platform,
        "inputs": [_described(spec) for spec in model.inputs],
        "outputs": [_described(spec) for spec in model.outputs],
    }


def _described(spec: TensorSpec) -> dict[str, Any]:
    found = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    return {**found, "optional": True} if spec.optional else found
