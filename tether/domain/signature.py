"""Signatures of models, and checks of requests against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tether.domain.tensor import Tensor
from tether.errors import BadTensor, ModelRejected


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Declaration of one input or output; -1 in ``shape`` is an axis of any length.

    ``axes`` are the model's names of such axes, empty for unnamed ones; () if it names none. Axes of two
    inputs with the same name have the same length, unless the name has no letter or digit, as the '?' of some
    exporters. An ``optional`` input has a default if a request omits it.
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
    """Return the served signature of a file: ``wanted``, else ``serving_default``, else the only one.

    Raises:
        ModelRejected: there is no such signature; the message lists the existing ones.
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
        f"the model has no signature '{SERVING_DEFAULT}', and not exactly one other; it has: {listed}"
        + ("; choose one with --signature NAME" if known else "; save it with signatures"),
        field="signature",
    )


MOST_RUNS = 4096
"""Maximum number of runs that one request is split into."""


def check_inputs(model: Signature, inputs: tuple[Tensor, ...], *, run_rows: int) -> None:
    """Check a request's tensors against a version's signature.

    With ``run_rows`` (rows of one run; 0: not batched) all inputs must have the same number of rows, at most
    ``MOST_RUNS`` runs.

    Raises:
        BadTensor: naming the tensor, the given and the expected value.
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
        raise BadTensor(f"input '{missing}' is required by model '{model.name}', but missing", field=missing)
    if rows > run_rows * MOST_RUNS:
        raise BadTensor(
            f"the inputs have {rows} rows; model '{model.name}' accepts at most {run_rows * MOST_RUNS} in one request, "
            f"which are {MOST_RUNS} runs of {run_rows}: send several requests",
            field="inputs",
        )


def gives_optional(model: Signature, inputs: tuple[Tensor, ...]) -> bool:
    """Return True if a request gives an optional input. Its first axis is not rows, so the request must run
    alone."""
    optional = {spec.name for spec in model.inputs if spec.optional}
    return bool(optional) and any(tensor.name in optional for tensor in inputs)


def _same_rows(tensor: Tensor, rows: int) -> int:
    own = tensor.shape[0]
    if rows not in (-1, own):
        raise BadTensor(
            f"input '{tensor.name}' has {own} rows, but another input has {rows}; all inputs need the same first axis",
            field=f"{tensor.name}.shape",
        )
    return own


def _check_axes(spec: TensorSpec, tensor: Tensor, named: dict[str, tuple[str, int]]) -> None:
    """Check that axes with the same name have the same length; ``named`` has those of earlier inputs.

    Axes within one input are not compared, because exporters give height and width the same name.
    """
    for place, (axis, length) in enumerate(zip(spec.axes, tensor.shape, strict=True)):
        other, expected = named.setdefault(axis, (tensor.name, length))
        if length != expected and other != tensor.name and any(map(str.isalnum, axis)):
            raise BadTensor(
                f"input '{tensor.name}' has {length} on axis {place} ('{axis[:64]}'), "
                f"but input '{other}' has {expected} on the axis of the same name; they must be equal",
                field=f"{tensor.name}.shape",
            )


def _unexpected(model: Signature, inputs: tuple[Tensor, ...], tensor: Tensor) -> BadTensor:
    if sum(other.name == tensor.name for other in inputs) > 1:
        return BadTensor(f"input '{tensor.name}' is given more than once", field=tensor.name)
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
    """Check that every requested output exists and is requested once.

    Raises:
        BadTensor: naming the first invalid one.
    """
    known = {spec.name for spec in model.outputs}
    if len(set(names)) != len(names):
        raise BadTensor("an output is requested more than once", field="outputs")
    for name in names:
        if name not in known:
            listed = ", ".join(f"'{output}'" for output in sorted(known))
            raise BadTensor(
                f"model '{model.name}' has no output '{name[:64]}'; its outputs are {listed}", field="outputs"
            )


def metadata(model: Signature, versions: tuple[int, ...]) -> dict[str, Any]:
    """Return the OIP model metadata object."""
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
