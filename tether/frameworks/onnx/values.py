"""Converts tensors to and from ONNX Runtime where numpy lacks their type."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from tether.frameworks.onnx.library import onnxruntime

Array = np.ndarray[Any, np.dtype[Any]]

BF16_CODE = 16
"""``TensorProto.BFLOAT16``: numpy lacks this type, so its bits travel as uint16."""


def to_text(array: Array) -> Array:
    """Decode elements of a BYTES tensor to text, as ONNX strings are.

    Raises:
        UnicodeDecodeError: an element is not UTF-8.
    """
    return np.array([item.decode() for item in array.ravel()], dtype=np.object_).reshape(array.shape)


def to_value(array: Array) -> Any:
    """Convert an array to a value of ONNX Runtime."""
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BF16_CODE)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def from_value(value: Any) -> Array:
    """Convert a value of ONNX Runtime to an array."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, dtype=ml_dtypes.bfloat16)
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    bits: Array = np.ctypeslib.as_array(pointer, shape=shape or (1,)).copy()
    array: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return array
