"""Models, values and helpers of the conformance tests with ``tritonclient``."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
from onnx import helper
from support.models import models
from tritonclient.utils import InferenceServerException

Array = npt.NDArray[Any]

VALUES: dict[str, Array] = {
    "BOOL": np.array([[True, False, True, False], [False, True, True, False]]),
    "UINT8": np.array([[0, 1, 2, 255], [9, 8, 7, 6]], np.uint8),
    "UINT16": np.array([[0, 1, 2, 65535], [9, 8, 7, 6]], np.uint16),
    "UINT32": np.array([[0, 1, 2, 2**32 - 1], [9, 8, 7, 6]], np.uint32),
    "UINT64": np.array([[0, 1, 2, 2**64 - 1], [9, 8, 7, 6]], np.uint64),
    "INT8": np.array([[0, -1, 127, -128], [9, 8, 7, 6]], np.int8),
    "INT16": np.array([[0, -1, 32767, -32768], [9, 8, 7, 6]], np.int16),
    "INT32": np.array([[0, -1, 2**31 - 1, -(2**31)], [9, 8, 7, 6]], np.int32),
    "INT64": np.array([[0, -1, 2**63 - 1, -(2**63)], [9, 8, 7, 6]], np.int64),
    "FP16": np.array([[0, -1.5, 65504, 1e-7], [9, 8, 7, 6]], np.float16),
    "BF16": np.array([[0, -1.5, 3e38, 1e-7], [9, 8, 7, 6]], ml_dtypes.bfloat16),
    "FP32": np.array([[0, -1.5, 3.4e38, 1e-30], [9, 8, 7, 6]], np.float32),
    "FP64": np.array([[0, -1.5, 1.7e308, 1e-300], [9, 8, 7, 6]], np.float64),
    "BYTES": np.array([["", "a", "grüße", "汉字"], ["9", "8", "7", "6" * 300]], np.object_),
}
BINARY_ONLY = ("FP16", "BF16")


def two_outputs() -> bytes:
    """``total = a + b`` and ``left = a``, from two inputs."""
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Identity", ["a"], ["left"])]
    inputs = [models.value(name, "FP32", ["n", 3]) for name in ("a", "b")]
    outputs = [models.value(name, "FP32", ["n", 3]) for name in ("total", "left")]
    return models.to_bytes(models.model(nodes, inputs, outputs))


MODELS = {
    **{f"same-{datatype.lower()}": models.identity(datatype) for datatype in VALUES},
    "two": two_outputs(),
    "classifier": models.classifier(),
    "fixed": models.identity("FP32", (4,)),
}


def given(name: str, array: Array, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def texts(array: Array) -> list[bytes]:
    return [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]


def assert_same(datatype: str, got: Array, sent: Array) -> None:
    assert got.shape == sent.shape
    if datatype == "BYTES":
        assert texts(got) == texts(sent)
    else:
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)


def two_inputs() -> list[triton.InferInput]:
    return [given("a", np.full((2, 3), 1.5, np.float32)), given("b", np.full((2, 3), 2.0, np.float32))]


def refused(work: Any, *words: str, status: str = "400") -> None:
    """``work`` fails with this status, and the client can show our own message."""
    with pytest.raises(InferenceServerException) as caught:
        work()
    text = str(caught.value)
    assert f"[{status}]" in text, text
    for word in words:
        assert word in text, text
