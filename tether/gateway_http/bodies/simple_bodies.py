"""Converts plain nested lists to tensors and back, for ``POST /v1/inference``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array, Datatype, Tensor, to_numpy
from tether.errors import BadTensor, InvalidRequest
from tether.gateway_http.schemas.common import InferenceAnswer
from tether.wire import oip, oip_json

_FLOATS = (Datatype.FP16, Datatype.BF16)
"""Datatypes that this route sends as FP32: JSON can represent them, the protocol's JSON form cannot."""

_any = msgspec.json.Decoder(Any)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_objects = msgspec.json.Decoder(list[msgspec.Raw])
_encode = msgspec.json.Encoder().encode


def read_input(data: bytes, model: str, specs: Mapping[str, TensorSpec]) -> tuple[Tensor, ...]:
    """Return the tensors of ``inputData`` for a model with the inputs ``specs``.

    Raises:
        BadJson, BadTensor: naming the input and the invalid value.
    """
    opening = data.lstrip()[:1]
    if opening == b"{":
        fields: dict[str, msgspec.Raw] = oip_json.parse(_object, data, where="inputData")
        return tuple([_tensor(name, bytes(raw), specs) for name, raw in fields.items()])
    if opening == b"[" and data.lstrip()[1:].lstrip()[:1] == b"{":
        return oip.tensors_from_json(oip_json.parse(_objects, data, where="inputData"), where="inputData")
    if len(specs) != 1:
        names = ", ".join(f"'{name}'" for name in specs)
        raise BadTensor(f"inputData must be an object: model '{model}' has the inputs {names}", field="inputData")
    (name,) = specs
    return (_tensor(name, data, specs),)


def _tensor(name: str, data: bytes, specs: Mapping[str, TensorSpec]) -> Tensor:
    spec = specs.get(name)
    if spec is None:
        known = ", ".join(f"'{name}'" for name in specs)
        raise BadTensor(f"unknown input '{name[:64]}' in inputData; expected: {known}", field=name[:64])
    shape = _shape(oip_json.parse(_any, data, where=f"inputData.{name}"))
    wide = "FP32" if spec.datatype in _FLOATS else spec.datatype
    tensor = oip_json.from_wire(oip_json.WireTensor(name, shape, wide, None, msgspec.Raw(data)), f"inputData.{name}")
    if spec.datatype not in _FLOATS:
        return tensor
    narrow = to_numpy(tensor).astype(NUMPY_DTYPES[spec.datatype])
    return Tensor(name, spec.datatype, shape, narrow.tobytes())


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a nested list by its first elements; other lengths are checked later."""
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def nested(tensor: Tensor) -> Any:
    """Return a tensor's values as nested lists.

    Raises:
        InvalidRequest: JSON cannot represent them; the message names the route that can.
    """
    array: Array = to_numpy(tensor)
    try:
        if tensor.datatype == Datatype.BYTES:
            flat = [element.decode() for element in array.ravel()]
            return np.array(flat, dtype=np.object_).reshape(tensor.shape).tolist()
    except UnicodeDecodeError as error:
        raise _no_json(tensor, "BYTES that are not UTF-8") from error
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise _no_json(tensor, "NaN or infinity")
    return array.tolist()


def _no_json(tensor: Tensor, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"output '{tensor.name}' contains {what}, which JSON cannot represent; "
        "request binary data from /v2/models/{model}/infer",
        field=tensor.name,
    )


def written(model: str, version: int, outputs: Sequence[Tensor]) -> bytes:
    """Encode the body of a response.

    Raises:
        InvalidRequest: JSON cannot represent an output.
    """
    return _encode(InferenceAnswer(model, str(version), {tensor.name: nested(tensor) for tensor in outputs}))
