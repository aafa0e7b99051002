"""Models whose answers can be told right from wrong, and requests for them."""

from __future__ import annotations

import time
from typing import Any

from chaos.platform import Platform
from onnx import TensorProto, helper
from support.models.models import add, model, to_bytes, value

add_constant = add
"""``y = x + constant``: another file for each constant."""


def square() -> bytes:
    """``y = x * x``. The last column is a number of loop turns, which cost time and change nothing."""
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["a2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [value("i", "INT64", []), value("go", "BOOL", []), value("a", "FP32", [1])],
        [value("go2", "BOOL", []), value("a2", "FP32", [1])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    nodes = [
        helper.make_node("Slice", ["x", "from", "to", "axis"], ["last"]),
        helper.make_node("ReduceMax", ["last"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "yes", "zero"], ["counted"], body=body),
        helper.make_node("Sub", ["counted", "counted"], ["nothing"]),
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node("Add", ["squares", "nothing"], ["y"]),
    ]
    weights = [
        helper.make_tensor("from", TensorProto.INT64, [1], [3]),
        helper.make_tensor("to", TensorProto.INT64, [1], [4]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
    ]
    return to_bytes(model(nodes, [value("x", "FP32", ["N", 4])], [value("y", "FP32", ["N", 4])], weights))


def widest(width: int) -> bytes:
    """The most of ``width`` numbers: a large input, a small answer."""
    node = helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=1)
    return to_bytes(model([node], [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", 1])]))


def body(number: int, turns: float = 0.0) -> dict[str, Any]:
    """The inputs of request ``number`` of :func:`square`."""
    data = [float(number % 1000), float(number // 1000 % 1000), 7.0, float(turns)]
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": data}]}


def row(*data: float) -> dict[str, Any]:
    """The inputs of a model with one row of four numbers."""
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": list(data)}]}


def right(outputs: Any, number: int) -> bool:
    """Whether these are the outputs for request ``number``."""
    found = outputs[0]["data"]
    wanted = ((number % 1000) ** 2, (number // 1000 % 1000) ** 2, 49)
    return all(abs(one - other) < 1 for one, other in zip(found, wanted, strict=False))


def turn_s(platform: Platform, model_name: str = "sq") -> float:
    """Seconds that one turn of the loop takes on this machine."""
    turns = 1_000_000
    began = time.monotonic()
    answer = platform.http.post(f"/v2/models/{model_name}/infer", json=body(1, turns))
    if answer.status_code != 200:
        raise RuntimeError(f"{model_name}: {answer.status_code} {answer.text[:200]}")
    return (time.monotonic() - began) / turns
