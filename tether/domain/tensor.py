"""Tensors in messages: a name, an OIP datatype, a shape, and row-major little-endian bytes.

The byte form is the Open Inference Protocol's binary tensor extension: fixed-size elements without padding,
BYTES elements as a little-endian ``uint32`` length followed by that many bytes.
"""

from __future__ import annotations

import math
import struct
from enum import StrEnum
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from tether.errors import BadTensor

MAX_RANK = 32
"""Maximum number of axes; numpy's own limit is 64."""

MAX_ELEMENTS = 2**40
MAX_BESIDE_ZERO = 2**56
"""Maximum product of the other axes of an empty tensor."""

Array = npt.NDArray[Any]


class Datatype(StrEnum):
    """The datatypes of OIP v2 and Triton's BF16."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Every datatype but BYTES, which has no fixed size."""

_DATATYPES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_LENGTH = struct.Struct("<I")


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One named tensor. ``data`` has the elements as described above and is never copied."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


LONGEST_NAME = 1024
"""Maximum length of a tensor's name."""


def fault_of_name(name: str) -> str:
    """Return why a tensor's name is invalid; empty if it is valid. Used for models and requests."""
    if not name:
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has more than {LONGEST_NAME} characters"
    return "" if name.isprintable() else "has a line break or another character that cannot be printed"


def element_count(shape: tuple[int, ...], *, name: str) -> int:
    """Return the product of ``shape``, checked.

    Raises:
        BadTensor: a negative axis, too many axes, or too many elements.
    """
    if len(shape) > MAX_RANK:
        raise BadTensor(f"tensor '{name}' has {len(shape)} axes; at most {MAX_RANK} are allowed", field=f"{name}.shape")
    if any(axis < 0 for axis in shape):
        raise BadTensor(f"tensor '{name}' has a negative axis in its shape {list(shape)}", field=f"{name}.shape")
    count = math.prod(shape)
    # libraries multiply the axes of an empty tensor too, and may overflow
    if count > MAX_ELEMENTS or (not count and math.prod(axis or 1 for axis in shape) > MAX_BESIDE_ZERO):
        raise BadTensor(
            f"tensor '{name}' has a shape of more than {MAX_ELEMENTS} elements: {str(list(shape))[:200]}",
            field=f"{name}.shape",
        )
    return count


def check(tensor: Tensor) -> None:
    """Check that datatype, shape and bytes agree.

    Raises:
        BadTensor: naming the tensor and the mismatch.
    """
    count = element_count(tensor.shape, name=tensor.name)
    dtype = NUMPY_DTYPES.get(tensor.datatype)
    if dtype is not None:
        expected = count * dtype.itemsize
        if len(tensor.data) != expected:
            raise BadTensor(
                f"tensor '{tensor.name}' has {len(tensor.data)} bytes; {tensor.datatype} of shape "
                f"{list(tensor.shape)} needs {expected}",
                field=f"{tensor.name}.data",
            )
        return
    if tensor.datatype != Datatype.BYTES:
        raise unknown_datatype(tensor.name, tensor.datatype)
    found = len(_split_bytes(tensor))
    if found != count:
        raise BadTensor(
            f"tensor '{tensor.name}' has {found} BYTES elements; shape {list(tensor.shape)} needs {count}",
            field=f"{tensor.name}.data",
        )


def unknown_datatype(name: str, datatype: str) -> BadTensor:
    known = ", ".join(Datatype)
    return BadTensor(
        f"tensor '{name}' has the unknown datatype '{datatype[:32]}'; known: {known}", field=f"{name}.datatype"
    )


def to_numpy(tensor: Tensor) -> Array:
    """Return the tensor as an array: a read-only view of its bytes, or ``object`` elements for BYTES.

    Raises:
        BadTensor: datatype, shape and bytes do not agree.
    """
    check(tensor)
    if tensor.datatype == Datatype.BYTES:
        array = np.empty(len(elements := _split_bytes(tensor)), dtype=np.object_)
        array[:] = elements
        return array.reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=NUMPY_DTYPES[tensor.datatype]).reshape(tensor.shape)


def from_numpy(name: str, array: Array) -> Tensor:
    """Convert an array to a tensor; strings and objects become BYTES (text as UTF-8).

    Raises:
        BadTensor: OIP has no datatype for the dtype.
    """
    if array.dtype.kind in "OSUT":
        return Tensor(name, "BYTES", tuple(array.shape), pack_bytes([_element(name, item) for item in array.ravel()]))
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    datatype = _DATATYPES.get(dtype)
    if datatype is None:
        raise BadTensor(f"tensor '{name}' has the numpy dtype {array.dtype}, which OIP has no datatype for", field=name)
    return Tensor(name, datatype, tuple(array.shape), np.ascontiguousarray(array, dtype=dtype).tobytes())


def pack_bytes(elements: list[bytes]) -> bytes:
    """Encode the elements of a BYTES tensor."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def unpack_bytes(tensor: Tensor) -> list[bytes]:
    """Return the flat elements of a BYTES tensor.

    Raises:
        BadTensor: the bytes are truncated or too long, or the count differs from the shape's.
    """
    check(tensor)
    return _split_bytes(tensor)


def _split_bytes(tensor: Tensor) -> list[bytes]:
    data, position, elements = tensor.data, 0, []
    while position < len(data):
        if position + 4 > len(data):
            raise _truncated(tensor)
        (length,) = _LENGTH.unpack_from(data, position)
        position += 4
        if position + length > len(data):
            raise _truncated(tensor)
        elements.append(bytes(data[position : position + length]))
        position += length
    return elements


def _truncated(tensor: Tensor) -> BadTensor:
    return BadTensor(
        f"tensor '{tensor.name}' has a BYTES element that runs past the end of its data", field=f"{tensor.name}.data"
    )


def _element(name: str, item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:
            raise BadTensor(f"tensor '{name}' has text that is not Unicode (a lone surrogate)", field=name) from error
    raise BadTensor(f"tensor '{name}' has a {type(item).__name__}; only text and bytes can be BYTES", field=name)
