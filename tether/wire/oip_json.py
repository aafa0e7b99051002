"""Converts a tensor's ``data`` between JSON and the little-endian bytes of a
:class:`~tether.domain.tensor.Tensor`.

Rules:

- ``data`` is flat, or nested exactly as ``shape``; ragged or other nesting and other counts are rejected.
- Integers must fit the datatype, without fraction or exponent; numbers that overflow FP32 or FP64 are rejected;
  text is not a number; BOOL is ``true``/``false`` or ``1``/``0``; BYTES are strings, sent as UTF-8.
- FP16 and BF16 have no JSON form (as in Triton), nor have NaN, infinities, or BYTES that are not UTF-8.
- The parameter ``"base64": true`` makes ``data`` one string: the tensor's binary form, for data without a JSON
  form.
- Duplicate keys in an object, and nesting deeper than the parser's stack, are rejected.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence, Sized
from functools import lru_cache
from typing import Any

import msgspec

from tether.domain.job import Parameter
from tether.domain.tensor import (
    Datatype,
    Tensor,
    check,
    element_count,
    fault_of_name,
    pack_bytes,
    unknown_datatype,
    unpack_bytes,
)
from tether.errors import BadJson, BadTensor, InvalidRequest
from tether.wire.json_duplicates import refuse_duplicates

MAX_TENSORS = 1024
"""Maximum number of inputs or outputs of a request, and of a model."""

MAX_PARAMETERS = 256
"""Maximum number of parameters of a request, or of one tensor in it."""

_STRUCT_CODES: dict[str, str] = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
_ELEMENT_TYPES: dict[str, Any] = {"BOOL": bool | int, "FP32": float, "FP64": float, "BYTES": str}
_BINARY_ONLY = (Datatype.FP16, Datatype.BF16)
_OPENING = re.compile(rb"(?:\s*\[)*+")
_PATH = re.compile(r"`(?:key` in `)?\$([^`]*)`")
_PLACE = re.compile(r"\(byte (\d+)\)")
_NO_NUMBER = re.compile(rb"[^-\w]?(?P<word>-?(NaN|Infinity)\b)")
_WORDS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?(?:NaN|Infinity)')
_SHORT = 64 << 10
_DECODING_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class WireTensor(msgspec.Struct, gc=False):
    """A tensor object of a JSON body, with undecoded ``data``."""

    name: str
    shape: tuple[int, ...] = ()
    datatype: str = ""
    parameters: dict[str, Parameter] | None = None
    data: msgspec.Raw = msgspec.Raw()


_wire_decoder = msgspec.json.Decoder(WireTensor)


def bad_json(error: Exception, *, where: str = "the body") -> BadJson:
    """Return a one-line error with the path of the fault, for any failure of the JSON parser."""
    if isinstance(error, RecursionError):
        return BadJson(f"{where} is nested too deeply")
    if isinstance(error, UnicodeError):
        return BadJson(f"{where} is not UTF-8")
    text = str(error)[:300]
    path = _PATH.search(text)
    field = (path.group(1).lstrip(".") or None) if path else None
    return BadJson(f"{where} is invalid: {text}", field=field)


def parse(decoder: msgspec.json.Decoder[Any], data: bytes | msgspec.Raw, *, where: str = "the body") -> Any:
    """Decode ``data``; translate every failure of the parser.

    Raises:
        BadJson: with the path of the fault.
    """
    try:
        return decoder.decode(data)
    except _DECODING_ERRORS as error:
        raise _common_fault(error, data, where) or bad_json(error, where=where) from error


def _common_fault(error: Exception, data: bytes | msgspec.Raw, where: str) -> BadJson | None:
    """Return the error for an empty text, and for NaN and infinities: not JSON, although many encoders write
    them."""
    found = _PLACE.search(str(error))
    text = bytes(data)
    if not text.strip():
        return BadJson(f"{where} is empty; expected JSON")
    word = _NO_NUMBER.match(text, max(0, int(found[1]) - 1)) if found else None
    if word is None:
        return None
    name = _name_around(text)
    tensor = f" of tensor '{name}'" if name else ""
    return BadJson(
        f"{where} has {word['word'].decode()} at byte {word.start('word')}{tensor}, which is not JSON; send the tensor "
        'as binary data, or in base64 (parameter "base64": true)',
        field=name or None,
    )


def _name_around(text: bytes) -> str:
    """Return the name in the innermost object with such a word; empty if the text is too long or otherwise
    invalid."""
    if len(text) > _SHORT:
        return ""
    marked = _WORDS.sub(lambda found: found[0] if found[0].startswith(b'"') else b'"\\u0000"', text)
    try:
        open_: list[tuple[str, Any]] = [("", msgspec.json.decode(marked))]
    except _DECODING_ERRORS:
        return ""
    while open_:
        name, value = open_.pop()
        if value == "\0":
            return name
        if isinstance(value, dict):
            name = str(value.get("name", name))
            value = list(value.values())
        if isinstance(value, list):
            open_ += [(name, part) for part in value]
    return ""


def parse_body(decoder: msgspec.json.Decoder[Any], data: bytes, *, where: str = "the body") -> Any:
    """Decode a whole document of a client, as :func:`parse` does.

    Raises:
        BadJson: also for a duplicate key.
    """
    found = parse(decoder, data, where=where)
    refuse_duplicates(data)
    return found


def wire_tensor(item: WireTensor | msgspec.Raw | Mapping[str, Any], where: str) -> WireTensor:
    """Return one tensor object, whatever its stage of decoding.

    Raises:
        BadJson: it is not a tensor object.
    """
    if isinstance(item, WireTensor):
        return item
    if isinstance(item, msgspec.Raw):
        return parse(_wire_decoder, item, where=where)  # type: ignore[no-any-return]
    try:
        encoded = msgspec.json.encode(item)
    except (TypeError, ValueError, RecursionError) as error:
        raise bad_json(error, where=where) from error
    return parse(_wire_decoder, encoded, where=where)  # type: ignore[no-any-return]


def check_count(items: Sized, where: str) -> None:
    """Reject more tensors than any model has, before checking each.

    Raises:
        BadTensor: naming the list.
    """
    if len(items) > MAX_TENSORS:
        raise BadTensor(f"{where} has {len(items)} entries; at most {MAX_TENSORS} are allowed", field=where)


def check_parameters(parameters: Mapping[str, Parameter] | None, where: str) -> None:
    """Reject too many parameters.

    Raises:
        InvalidRequest: naming the object.
    """
    if parameters and len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(
            f"{where} has {len(parameters)} entries; at most {MAX_PARAMETERS} are allowed", field=where
        )


def check_heading(wire: WireTensor, where: str) -> None:
    """Reject unprintable names, unknown datatypes, and too many parameters.

    Raises:
        BadTensor: naming the field.
    """
    if fault := fault_of_name(wire.name):
        raise BadTensor(f"{where}.name {fault}", field=f"{where}.name")
    if wire.datatype not in Datatype.__members__:
        raise unknown_datatype(wire.name, wire.datatype)
    check_parameters(wire.parameters, f"{where}.parameters")


def from_wire(wire: WireTensor, where: str) -> Tensor:
    """Return the tensor of a JSON tensor object with ``data``.

    Raises:
        BadTensor: naming the tensor, the place in the body and the mismatch.
    """
    check_heading(wire, where)
    for elsewhere in ("binary_data_size", "shared_memory_region"):
        if wire.parameters and elsewhere in wire.parameters:
            raise BadTensor(f"{where} ('{wire.name}') has {elsewhere}, which is not supported here", field=where)
    if not memoryview(wire.data):
        raise BadTensor(f"{where} ('{wire.name}') has no data", field=f"{where}.data")
    if wire.parameters and wire.parameters.get("base64") is True:
        return _from_base64(wire, where)
    return Tensor(wire.name, wire.datatype, wire.shape, _from_json(wire, where))


def _from_base64(wire: WireTensor, where: str) -> Tensor:
    text = parse(_text_decoder, wire.data, where=f"{where}.data")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadTensor(f"{where}.data of '{wire.name}' is not base64", field=f"{where}.data") from error
    tensor = Tensor(wire.name, wire.datatype, wire.shape, data)
    check(tensor)
    return tensor


_text_decoder = msgspec.json.Decoder(str)


def _from_json(wire: WireTensor, where: str) -> bytes:
    name, datatype, shape = wire.name, wire.datatype, wire.shape
    if datatype in _BINARY_ONLY:
        raise BadTensor(f"tensor '{name}': {datatype} has no JSON form; send it as binary data", field=f"{where}.data")
    count = element_count(shape, name=name)
    opening = _OPENING.match(memoryview(wire.data))
    depth = bytes(memoryview(wire.data)[: opening.end()]).count(b"[") if opening else 0
    fits = depth in (1, len(shape)) if count else 1 <= depth <= max(len(shape), 1)
    if not fits:
        raise BadTensor(
            f"{where}.data of '{name}' is nested {depth} deep; shape {list(shape)} needs a flat list or that nest",
            field=f"{where}.data",
        )
    try:
        values = _decoder(datatype, depth).decode(wire.data)
    except _DECODING_ERRORS as error:
        raise _misfit(error, name, datatype, where) from error
    flat = _flatten([values] if depth == 0 else values, shape, depth, name, where)
    if len(flat) != count:
        raise BadTensor(
            f"{where}.data of '{name}' has {len(flat)} elements; shape {list(shape)} needs {count}",
            field=f"{where}.data",
        )
    return _pack(datatype, flat, name, where)


@lru_cache(maxsize=512)
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    form: Any = _ELEMENT_TYPES.get(datatype, int)
    for _ in range(depth):
        form = list[form]
    return msgspec.json.Decoder(form)


def _misfit(error: Exception, name: str, datatype: str, where: str) -> BadTensor:
    found = _PATH.search(str(error))
    path = found.group(1) if found else ""
    reason = str(error).split(" - at ", maxsplit=1)[0][:200] if isinstance(error, msgspec.MsgspecError) else "not UTF-8"
    return BadTensor(f"{where}.data{path} of '{name}' does not fit {datatype}: {reason}", field=f"{where}.data")


def _flatten(values: list[Any], shape: tuple[int, ...], depth: int, name: str, where: str) -> list[Any]:
    for axis in range(depth - 1):
        widths = {len(row) for row in values}
        if len(values) != math.prod(shape[: axis + 1]) or widths - {shape[axis + 1]}:
            raise BadTensor(
                f"{where}.data of '{name}' is not a regular nest of shape {list(shape)}", field=f"{where}.data"
            )
        values = values[0] if len(values) == 1 else list(itertools.chain.from_iterable(values))
    return values


def _pack(datatype: str, flat: list[Any], name: str, where: str) -> bytes:
    try:
        if datatype == Datatype.BYTES:
            return pack_bytes([text.encode() for text in flat])
        if datatype == Datatype.BOOL and flat and not 0 <= min(flat) <= max(flat) <= 1:
            raise OverflowError("only true, false, 1 and 0 are booleans")
        return struct.pack(f"<{len(flat)}{_STRUCT_CODES[datatype]}", *flat)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        reason = "a value is out of range" if isinstance(error, struct.error) else str(error)
        raise BadTensor(f"{where}.data of '{name}' does not fit {datatype}: {reason}", field=f"{where}.data") from error


def json_values(tensor: Tensor) -> Sequence[Any]:
    """Return the elements of a tensor, flat and in row-major order, for a JSON encoder.

    Raises:
        InvalidRequest: the tensor has no JSON form (FP16, BF16, NaN, infinity, BYTES that are not UTF-8);
            the message
            says to request binary data.
        BadTensor: datatype, shape and bytes do not agree.
    """
    if tensor.datatype == Datatype.BYTES:
        try:
            return [element.decode() for element in unpack_bytes(tensor)]
        except UnicodeDecodeError as error:
            raise _binary_only(tensor, "BYTES that are not UTF-8") from error
    check(tensor)
    if tensor.datatype in _BINARY_ONLY:
        raise _binary_only(tensor, tensor.datatype)
    code = _STRUCT_CODES[tensor.datatype]
    values = struct.unpack(f"<{len(tensor.data) // struct.calcsize('<' + code)}{code}", tensor.data)
    if code in "fd" and not math.isfinite(sum(values)) and not all(map(math.isfinite, values)):
        raise _binary_only(tensor, "NaN or infinity")
    return values


def _binary_only(tensor: Tensor, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"tensor '{tensor.name}' has {what}, which JSON cannot represent; request binary data "
        '(output parameter "binary_data": true)',
        field=tensor.name,
    )


def tensor_to_json(tensor: Tensor, *, compact: bool = False) -> dict[str, Any]:
    """Return a tensor as a plain JSON object: flat ``data``, or base64 with ``compact`` or without a JSON
    form.

    Raises:
        BadTensor: datatype, shape and bytes do not agree.
    """
    found: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    if not compact:
        try:
            found["data"] = list(json_values(tensor))
        except BadTensor:
            raise
        except InvalidRequest:
            compact = True
    if compact:
        check(tensor)
        found["parameters"] = {"base64": True}
        found["data"] = base64.b64encode(tensor.data).decode()
    return found


def tensors_from_json(
    items: Sequence[WireTensor | msgspec.Raw | Mapping[str, Any]], *, where: str = "inputs"
) -> tuple[Tensor, ...]:
    """Return the tensors of a JSON body without a binary part, such as a job's; ``where`` names the list in
    errors.

    Raises:
        BadJson, BadTensor: naming the place in the body and the mismatch.
    """
    check_count(items, where)
    found = []
    for index, item in enumerate(items):
        place = f"{where}[{index}]"
        found.append(from_wire(wire_tensor(item, place), place))
    return tuple(found)
