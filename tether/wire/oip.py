"""Encodes and decodes bodies of the Open Inference Protocol v2 with the binary tensor extension. Pure.

Used by the gateway and the client. A body is JSON, or JSON followed by raw tensors; the length of the JSON
part is in the header ``Inference-Header-Content-Length`` and is passed here as ``json_length``. For JSON
``data`` see :mod:`tether.wire.oip_json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tether.domain.job import Parameter
from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array, Datatype, Tensor, check, from_numpy, pack_bytes, to_numpy
from tether.errors import BadTensor, InferenceFailed, InvalidRequest
from tether.wire.oip_json import (
    WireTensor,
    bad_json,
    check_count,
    check_heading,
    check_parameters,
    from_wire,
    json_values,
    parse,
    parse_body,
    tensor_to_json,
    tensors_from_json,
)

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "InferResponse",
    "RequestedOutput",
    "WireTensor",
    "bad_json",
    "build_infer_request",
    "build_infer_response",
    "classify",
    "parse_infer_request",
    "parse_infer_response",
    "tensor_to_json",
    "tensors_from_json",
]

HEADER_LENGTH = "inference-header-content-length"
"""Name of the HTTP header with the length of the JSON part, in lower case."""


class RequestedOutput(msgspec.Struct, frozen=True, gc=False):
    """One requested output. ``classification``: number of best classes, 0 for the tensor itself."""

    name: str
    binary: bool = False
    classification: int = 0


class InferRequest(msgspec.Struct, frozen=True):
    """A decoded request. No ``outputs`` means all of them, in the model's order."""

    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_default: bool = False
    parameters: dict[str, Parameter] = {}


class InferResponse(msgspec.Struct, frozen=True):
    """A decoded response; arrays of binary tensors are views of the body."""

    model: str
    version: str
    id: str
    outputs: dict[str, Array]


class _WireOutput(msgspec.Struct, gc=False):
    name: str
    parameters: dict[str, Parameter] | None = None


class _WireRequest(msgspec.Struct):
    inputs: list[WireTensor]
    id: str = ""
    outputs: list[_WireOutput] = []
    parameters: dict[str, Parameter] = {}


class _WireResponse(msgspec.Struct):
    outputs: list[WireTensor]
    model_name: str = ""
    model_version: str = ""
    id: str = ""


class _OutTensor(msgspec.Struct, omit_defaults=True, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Parameter] | None = None
    data: Sequence[Any] | None = None


class _OutRequest(msgspec.Struct, omit_defaults=True):
    inputs: list[_OutTensor]
    id: str = ""
    parameters: Mapping[str, Parameter] = {}
    outputs: list[_WireOutput] = []


class _OutResponse(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_OutTensor]
    id: str = ""


_request_decoder = msgspec.json.Decoder(_WireRequest)
_response_decoder = msgspec.json.Decoder(_WireResponse)
_encode = msgspec.json.Encoder().encode


def parse_infer_request(
    body: bytes, json_length: int | None, *, specs: Mapping[str, TensorSpec] | None = None
) -> InferRequest:
    """Decode the body of an infer request. ``json_length`` None (no header) means that all of it is JSON.

    ``specs`` are the model's inputs by name; only a raw request (``json_length`` 0) needs them.

    Raises:
        BadJson: the JSON part is malformed.
        BadTensor: a tensor's data, shape, size or datatype is invalid; naming it.
        InvalidRequest: ``json_length`` is outside the body, or bytes are left over.
    """
    if json_length == 0:
        return _raw_request(body, specs)
    head, rest = _split(body, json_length)
    wire: _WireRequest = parse_body(_request_decoder, head)
    check_parameters(wire.parameters, "parameters")
    check_count(wire.outputs, "outputs")
    default = _flag(wire.parameters, "binary_data_output", "parameters")
    outputs = tuple([_requested(output, default, place) for place, output in enumerate(wire.outputs)])
    return InferRequest(wire.id, _tensors(wire.inputs, rest, "inputs"), outputs, default, wire.parameters)


def _split(body: bytes, json_length: int | None) -> tuple[bytes, bytes | None]:
    if json_length is None:
        return body, None
    if not 0 < json_length <= len(body):
        raise InvalidRequest(
            f"{HEADER_LENGTH} is {json_length}; it must be between 0 and the body's {len(body)} bytes",
            field=HEADER_LENGTH,
        )
    return body[:json_length], body[json_length:]


def _tensors(wires: list[WireTensor], rest: bytes | None, section: str) -> tuple[Tensor, ...]:
    """Return the tensors of a body; those with ``binary_data_size`` take their bytes from ``rest``, in order."""
    check_count(wires, section)
    found, position = [], 0
    for index, wire in enumerate(wires):
        where = f"{section}[{index}]"
        parameters = wire.parameters
        if not parameters or "binary_data_size" not in parameters:
            found.append(from_wire(wire, where))
            continue
        check_heading(wire, where)
        end = position + _binary_size(wire, rest, where, position)
        tensor = Tensor(wire.name, wire.datatype, wire.shape, rest[position:end] if rest else b"")
        check(tensor)
        found.append(tensor)
        position = end
    if rest and position != len(rest):
        raise InvalidRequest(f"{len(rest) - position} unexpected bytes after the last tensor; check binary_data_size")
    return tuple(found)


def _binary_size(wire: WireTensor, rest: bytes | None, where: str, position: int) -> int:
    size = (wire.parameters or {})["binary_data_size"]
    field = f"{where}.parameters.binary_data_size"
    if type(size) is not int or size < 0:
        raise BadTensor(f"{field} of '{wire.name}' must be a whole number of bytes", field=field)
    if memoryview(wire.data):
        raise BadTensor(f"{where} ('{wire.name}') has both data and binary_data_size; send one", field=f"{where}.data")
    if rest is None:
        raise BadTensor(
            f"{where} ('{wire.name}') has binary_data_size, but the header {HEADER_LENGTH} is missing", field=field
        )
    if position + size > len(rest):
        raise BadTensor(
            f"{field} of '{wire.name}' is {size}, but only {len(rest) - position} bytes are left in the body",
            field=field,
        )
    return size


def _flag(parameters: Mapping[str, Parameter] | None, name: str, where: str, default: bool = False) -> bool:
    value = (parameters or {}).get(name, default)
    if type(value) is not bool:
        raise InvalidRequest(f"{where}.{name} must be true or false", field=f"{where}.{name}")
    return value


def _requested(wire: _WireOutput, default: bool, place: int) -> RequestedOutput:
    if not wire.parameters:
        return RequestedOutput(wire.name, default)
    where = f"outputs[{place}].parameters"
    check_parameters(wire.parameters, where)
    count = wire.parameters.get("classification", 0)
    if type(count) is not int or count < 0:
        raise InvalidRequest(f"{where}.classification must be a whole number", field=f"{where}.classification")
    if "shared_memory_region" in wire.parameters:
        raise InvalidRequest(f"{where}.shared_memory_region: shared memory is not supported", field=where)
    return RequestedOutput(wire.name, _flag(wire.parameters, "binary_data", where, default), count)


def _raw_request(body: bytes, specs: Mapping[str, TensorSpec] | None) -> InferRequest:
    if not specs or len(specs) != 1:
        raise InvalidRequest(
            f"a raw request ({HEADER_LENGTH}: 0) needs a model with exactly one input", field=HEADER_LENGTH
        )
    (spec,) = specs.values()
    tensor = Tensor(spec.name, spec.datatype, _raw_shape(spec, len(body)), body)
    if spec.datatype == Datatype.BYTES:
        tensor = Tensor(spec.name, spec.datatype, tensor.shape, pack_bytes([body]))
    check(tensor)
    return InferRequest("", (tensor,), (), binary_default=True)


def _raw_shape(spec: TensorSpec, size: int) -> tuple[int, ...]:
    """Return the shape with its variable axis computed; a batch axis is 1 if another one is variable."""
    shape = list(spec.shape)
    if shape.count(-1) == 2 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise InvalidRequest(
            f"a raw request needs at most one variable axis; input '{spec.name}' has shape {list(spec.shape)}",
            field=HEADER_LENGTH,
        )
    if spec.datatype == Datatype.BYTES:
        return tuple(1 if axis == -1 else axis for axis in shape)
    if -1 in shape:
        known = NUMPY_DTYPES[spec.datatype].itemsize
        for axis in shape:
            known *= 1 if axis == -1 else axis
        shape[shape.index(-1)] = size // known if known else 0
    return tuple(shape)


def build_infer_response(
    *, model: str, version: str | int, request: InferRequest, outputs: Sequence[Tensor]
) -> tuple[bytes, int | None]:
    """Encode a response; also return the length of its JSON part if binary tensors follow it.

    Outputs have the requested order and form; the request's id is repeated if it had one.

    Raises:
        InvalidRequest: an output has no JSON form (FP16, BF16, NaN, infinity, BYTES that are not UTF-8),
            or cannot be
            classified; the message says to request binary data.
        InferenceFailed: the model did not return a requested output.
    """
    objects: list[_OutTensor] = []
    parts: list[bytes] = [b""]
    for tensor, binary in _answered(request, outputs):
        if binary:
            check(tensor)
            size: dict[str, Parameter] = {"binary_data_size": len(tensor.data)}
            objects.append(_OutTensor(tensor.name, tensor.datatype, tensor.shape, size))
            parts.append(tensor.data)
        else:
            objects.append(_OutTensor(tensor.name, tensor.datatype, tensor.shape, None, json_values(tensor)))
    return _joined(_OutResponse(model, str(version), objects, request.id), parts)


def _answered(request: InferRequest, outputs: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    if not request.outputs:
        return [(tensor, request.binary_default) for tensor in outputs]
    by_name = {tensor.name: tensor for tensor in outputs}
    found = []
    for wanted in request.outputs:
        tensor = by_name.get(wanted.name)
        if tensor is None:
            raise InferenceFailed(f"the model did not return the output '{wanted.name[:64]}'", field="outputs")
        found.append((classify(tensor, wanted.classification) if wanted.classification else tensor, wanted.binary))
    return found


def _joined(head: msgspec.Struct, parts: list[bytes]) -> tuple[bytes, int | None]:
    encoded = _encode(head)
    if len(parts) == 1:
        return encoded, None
    parts[0] = encoded
    return b"".join(parts), len(encoded)


def classify(tensor: Tensor, count: int) -> Tensor:
    """Return the ``count`` best classes along the last axis, best first, as BYTES ``value:index``.

    Raises:
        InvalidRequest: the tensor is not numeric, or has no axis.
    """
    if tensor.datatype in (Datatype.BYTES, Datatype.BOOL) or not tensor.shape:
        raise InvalidRequest(
            f"output '{tensor.name}' cannot be classified: it must be numeric and have an axis", field="outputs"
        )
    array = to_numpy(tensor)
    count = min(count, array.shape[-1])
    rows = array.reshape(-1, array.shape[-1]) if array.size else array.reshape(0, 1)
    whole = rows.dtype.kind in "iu"
    values: Array = rows if whole else rows.astype(np.float64)
    order = np.argsort(np.invert(values) if whole else -values, axis=-1, kind="stable")[:, :count]
    text = "{:d}:{}" if whole else "{:f}:{}"
    elements = [
        text.format(row[index].item(), index).encode()
        for row, best in zip(values, order, strict=True)
        for index in best
    ]
    return Tensor(tensor.name, Datatype.BYTES.value, (*array.shape[:-1], count), pack_bytes(elements))


def build_infer_request(
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] = (),
    id: str = "",
    binary: bool = True,
    parameters: Mapping[str, Parameter] | None = None,
) -> tuple[bytes, int | None]:
    """Encode a request; also return the length of its JSON part if binary tensors follow it.

    Raises:
        BadTensor: an array's dtype has no OIP datatype.
        InvalidRequest: ``binary`` is off and an input has no JSON form.
    """
    tensors = [from_numpy(name, np.asarray(array)) for name, array in inputs.items()]
    wanted = [_WireOutput(name, {"binary_data": binary}) for name in outputs]
    extra: dict[str, Parameter] = dict(parameters or {})
    if not binary:
        objects = [_OutTensor(t.name, t.datatype, t.shape, None, json_values(t)) for t in tensors]
        return _encode(_OutRequest(objects, id, extra, wanted)), None
    if not wanted:
        extra["binary_data_output"] = True
    objects = [_OutTensor(t.name, t.datatype, t.shape, {"binary_data_size": len(t.data)}) for t in tensors]
    return _joined(_OutRequest(objects, id, extra, wanted), [b"", *(tensor.data for tensor in tensors)])


def parse_infer_response(body: bytes, json_length: int | None) -> InferResponse:
    """Decode the body of a response; BYTES become ``object`` arrays of ``bytes``.

    Raises:
        BadJson, BadTensor, InvalidRequest: the server violated the protocol.
    """
    head, rest = _split(body, json_length)
    wire: _WireResponse = parse(_response_decoder, head)
    tensors = _tensors(wire.outputs, rest, "outputs")
    return InferResponse(wire.model_name, wire.model_version, wire.id, {t.name: to_numpy(t) for t in tensors})
