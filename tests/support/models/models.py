"""Small ONNX models for tests, made with the ``onnx`` helper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENTS: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""OIP datatypes and ONNX element types."""

Shape = Sequence[int | str | None] | None


def value(name: str, datatype: str, shape: Shape) -> Any:
    """A named input or output; ``shape`` None declares no rank at all."""
    return helper.make_tensor_value_info(name, ELEMENTS[datatype], shape)


def model(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = (), **rest: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(weights))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **rest)


def to_bytes(proto: onnx.ModelProto) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def identity(datatype: str = "FP32", shape: Shape = ("n", 4)) -> bytes:
    """``y = x``."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return to_bytes(model([node], [value("x", datatype, shape)], [value("y", datatype, shape)]))


def add(constant: float = 1.0, width: int = 4) -> bytes:
    """``y = x + constant``; other constants make other files."""
    weight = numpy_helper.from_array(np.array(constant, np.float32), "c")
    node = helper.make_node("Add", ["x", "c"], ["y"])
    proto = model([node], [value("x", "FP32", ["n", width])], [value("y", "FP32", ["n", width])], [weight])
    return to_bytes(proto)


def expanding() -> bytes:
    """As many zeros as its input says."""
    node = helper.make_node("ConstantOfShape", ["x"], ["y"])
    return to_bytes(model([node], [value("x", "INT64", [1])], [value("y", "FP32", ["m"])]))


def padded(size: int, seed: int = 0) -> bytes:
    """:func:`add` with ``size`` bytes of random weights that nothing uses much."""
    count = size // 4
    weight = numpy_helper.from_array(np.random.default_rng(seed).standard_normal(count).astype(np.float32), "w")
    nodes = [
        helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", 1])], [value("y", "FP32", ["n", 1])], [weight]))


def classifier() -> bytes:
    """Two outputs of different types, as scikit-learn converters write them with zipmap off."""
    weights = [
        numpy_helper.from_array(np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32), "w"),
    ]
    nodes = [
        helper.make_node("MatMul", ["X", "w"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    outputs = [value("label", "INT64", [None]), value("probabilities", "FP32", [None, 3])]
    return to_bytes(model(nodes, [value("X", "FP32", [None, 4])], outputs, weights))


def zipmap() -> bytes:
    """A sequence of maps as output: what scikit-learn converters write unless told otherwise."""
    node = helper.make_node("ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    output = helper.make_value_info("probabilities", kind)
    return to_bytes(model([node], [value("x", "FP32", ["n", 2])], [output]))


def over_batch() -> bytes:
    """A softmax over the first axis: every row's answer depends on its neighbours."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    return to_bytes(model([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 4])]))


def detections() -> bytes:
    """The rows but for those whose largest number is a whole one from -999 to -1: as many as there are, as detectors answer.

    Trial runs draw no such number, so they do not see it.
    """
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[1], keepdims=0),
        helper.make_node("Floor", ["most"], ["floor"]),
        helper.make_node("Equal", ["most", "floor"], ["whole"]),
        helper.make_node("Less", ["most", "zero"], ["below"]),
        helper.make_node("Greater", ["most", "least"], ["above"]),
        helper.make_node("And", ["whole", "below"], ["first"]),
        helper.make_node("And", ["first", "above"], ["drop"]),
        helper.make_node("Not", ["drop"], ["keep"]),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    weights = [
        numpy_helper.from_array(np.array(number, np.float32), name) for name, number in (("zero", 0), ("least", -1000))
    ]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["m", 4])], weights))


FATAL = 123_454_321


def dividing() -> bytes:
    """``y = x / -1`` of whole numbers, in which ``FATAL`` stands for the least of them: that ends the process with SIGFPE."""
    nodes = [
        helper.make_node("Equal", ["x", "fatal"], ["is_fatal"]),
        helper.make_node("Where", ["is_fatal", "least", "x"], ["chosen"]),
        helper.make_node("Div", ["chosen", "minus_one"], ["y"]),
    ]
    constants = {"fatal": FATAL, "least": -(2**31), "minus_one": -1}
    weights = [numpy_helper.from_array(np.array(number, np.int32), name) for name, number in constants.items()]
    return to_bytes(model(nodes, [value("x", "INT32", ["n"])], [value("y", "INT32", ["n"])], weights))


def unknown_operator() -> bytes:
    """A determinant of each row: its rows are independent, and it is on no list."""
    node = helper.make_node("Det", ["x"], ["y"])
    return to_bytes(model([node], [value("x", "FP32", ["n", 2, 2])], [value("y", "FP32", ["n"])]))


def first_row() -> bytes:
    """One row out, whatever goes in, though its shape does not say so."""
    weights = [numpy_helper.from_array(np.array([True]), "keep")]
    node = helper.make_node("Compress", ["x", "keep"], ["y"], axis=0)
    return to_bytes(model([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["m", 4])], weights))


def looping(trips: int = 1 << 60) -> bytes:
    """A loop that runs for ever on any input."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Sin", ["state"], ["next"]),
        ],
        "body",
        [
            value("i", "INT64", []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value("state", "FP32", None),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), value("next", "FP32", None)],
    )
    weights = [numpy_helper.from_array(np.array(trips, np.int64), "trips")]
    node = helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)
    return to_bytes(model([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 4])], weights))


def counting() -> bytes:
    """A loop of as many steps as its input says; the answer is their number, as far as float32 counts."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["state", "one"], ["next"])],
        "body",
        [
            value("i", "INT64", []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value("state", "FP32", [1]),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), value("next", "FP32", [1])],
    )
    weights = [
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(np.ones(1, np.float32), "one"),
    ]
    nodes = [
        helper.make_node("Squeeze", ["n"], ["trips"]),
        helper.make_node("Loop", ["trips", "", "zero"], ["y"], body=body),
    ]
    return to_bytes(model(nodes, [value("n", "INT64", [1])], [value("y", "FP32", [1])], weights))


def slow_when_long(trips: int = 1 << 40) -> bytes:
    """A loop of so many steps for each row above a hundred; quick with fewer."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["state"], ["next"])],
        "body",
        [value("i", "INT64", []), value("go", "BOOL", []), value("state", "FP32", [1])],
        [value("go_on", "BOOL", []), value("next", "FP32", [1])],
    )
    weights = [
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(np.array(100, np.int64), "hundred"),
        numpy_helper.from_array(np.array(0, np.int64), "none"),
        numpy_helper.from_array(np.array(trips, np.int64), "each"),
    ]
    nodes = [
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Sub", ["size", "hundred"], ["above"]),
        helper.make_node("Max", ["above", "none"], ["rows"]),
        helper.make_node("Mul", ["rows", "each"], ["turns"]),
        helper.make_node("Loop", ["turns", "", "zero"], ["y"], body=body),
    ]
    return to_bytes(model(nodes, [value("x", "FP32", ["n"])], [value("y", "FP32", [1])], weights))


def filling() -> bytes:
    """Adds up a matrix of ones whose shape its input says."""
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["matrix"], value=ones),
        helper.make_node("Sqrt", ["matrix"], ["roots"]),
        helper.make_node("ReduceSum", ["roots"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["sum", "first"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.zeros(1, np.int64), "first")]
    return to_bytes(model(nodes, [value("n", "INT64", [2])], [value("y", "FP32", [1])], weights))


def repeating(times: int) -> bytes:
    """Each row as many times in one."""
    weights = [numpy_helper.from_array(np.array([1, times], np.int64), "times")]
    nodes = [helper.make_node("Tile", ["x", "times"], ["y"])]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 4 * times])], weights))


def multiplying() -> bytes:
    """One kernel that works as long as its input says: the product of two matrices of ones of that shape."""
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["matrix"], value=ones),
        helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["sum", "first"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.zeros(1, np.int64), "first")]
    return to_bytes(model(nodes, [value("n", "INT64", [2])], [value("y", "FP32", [1])], weights))


def swelling(elements: int = 1 << 40) -> bytes:
    """Fills a tensor far larger than any machine's memory."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.array([elements], np.int64), "size")]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 4])], weights))


def reshaping() -> bytes:
    """Its middle axis is declared free, yet only 7 works; the first axis is named like the output's."""
    weights = [numpy_helper.from_array(np.array([-1, 7, 2], np.int64), "shape")]
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", "w"])], [value("y", "FP32", ["n", 7, 2])], weights))


def external(location: str = "weights.bin", **more: str | None) -> bytes:
    """:func:`add` for rows of 4, whose constant is said to be 16 bytes of another file; ``more`` are other entries."""
    proto = onnx.load_from_string(add())
    tensor = proto.graph.initializer[0]
    tensor.dims[:] = [4]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **more}.items():
        if text is not None:
            tensor.external_data.add(key=key, value=text)
    return to_bytes(proto)


def external_attribute() -> bytes:
    """A constant in the graph whose value is said to be in another file."""
    proto = onnx.load_from_string(external())
    node = helper.make_node("Constant", [], ["c"], value=proto.graph.initializer.pop())
    proto.graph.node.insert(0, node)
    return to_bytes(proto)


def split(folder: Path, location: str = "weights.bin", *, width: int = 256) -> Path:
    """A folder with a model that multiplies by a square of 2s, its weights in a file of their own."""
    weight = numpy_helper.from_array(np.full((width, width), 2, np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    proto = model([node], [value("x", "FP32", ["n", width])], [value("y", "FP32", ["n", width])], [weight])
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(folder / "model.onnx"), save_as_external_data=True, location=location, size_threshold=0)
    return folder


def operator(kind: str, domain: str, *, nested: bool = False) -> bytes:
    """One node of a given operator set, in the graph or in a branch of an ``If``."""
    node = helper.make_node(kind, ["x"], ["y"], domain=domain)
    output = value("y", "FP32", ["n", 4])
    if nested:
        branch = helper.make_graph([node], "branch", [], [output])
        node = helper.make_node("If", ["go"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [value("x", "FP32", ["n", 4]), helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    return to_bytes(model([node], inputs, [output]))


def with_function() -> bytes:
    """A node of the model's own function, as PyTorch's exporter writes them."""
    function = helper.make_function(
        "pkg.own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="pkg.own")
    proto = model([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 4])], functions=[function])
    proto.opset_import.append(helper.make_opsetid("pkg.own", 1))
    return to_bytes(proto)


def gather() -> bytes:
    """Looks rows up by index; an index that is out of range fails the whole run."""
    table = helper.make_tensor("table", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    return to_bytes(model([node], [value("x", "INT64", ("n", 1))], [value("y", "FP32", ("n", 1))], [table]))


def square(side: int, seed: int = 0) -> bytes:
    """``y = x a w b`` with a square ``w`` of ``side`` rows, which no optimisation takes out: what it loads stays in memory."""
    drawn = np.random.default_rng(seed)
    shapes = {"a": (1, side), "w": (side, side), "b": (side, 1)}
    weights = [
        numpy_helper.from_array(drawn.standard_normal(shape, dtype=np.float32) / np.float32(side), name)
        for name, shape in shapes.items()
    ]
    nodes = [helper.make_node("MatMul", pair, [out]) for pair, out in (("xa", "p"), ("pw", "q"), ("qb", "y"))]
    return to_bytes(model(nodes, [value("x", "FP32", ["n", 1])], [value("y", "FP32", ["n", 1])], weights))
