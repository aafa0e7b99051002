"""What is proven of the rows of an ONNX graph: what each operator keeps apart, and where it does not."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support.models import models
from support.models.graphs import (
    IMAGE,
    LSTM,
    SEQUENCE,
    W33,
    W44,
    X,
    attribute,
    build,
    constant,
    node,
    proof,
    shape_chain,
)

INDEPENDENT = {
    "add a number": build([node("Add", "x c")], weights={"c": 1.0}),
    "add a row": build([node("Add", "x c")], weights={"c": np.ones(4)}),
    "add one row of two axes": build([node("Add", "x c")], weights={"c": np.ones((1, 4))}),
    "gemm": build([node("Gemm", "x w b", transB=1)], weights={"w": W44, "b": np.ones(4)}),
    "matmul from the left": build(
        [node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "w t", "u"), node("Transpose", "u", "y")],
        weights={"w": W44},
    ),
    "two inputs": build([node("Add", "x z")], [X, ("z", "FP32", ("n", 4))]),
    "inputs without names": build([node("Add", "x z")], [("x", "FP32", (None, 4)), ("z", "FP32", (None, 4))]),
    "softmax of columns": build([node("Softmax", axis=1)]),
    "old softmax": build([node("Softmax", axis=1)], opset=11),
    "mean of columns": build([node("ReduceMean", axes=[1], keepdims=0)], outputs=[("y", "FP32", ("n",))]),
    "sum over an axis of an input": build([node("ReduceSum", "x a", keepdims=0)], weights={"a": np.array([-1])}),
    "no axes and no work": build([node("ReduceSum", "x", noop_with_empty_axes=1)]),
    "mean over time": build([node("ReduceMean", axes=[1])], [SEQUENCE]),
    "argmax": build([node("ArgMax", axis=1, keepdims=0)], outputs=[("y", "INT64", ("n",))]),
    "top k": build([node("TopK", "x k", "y i")], weights={"k": np.array([2])}),
    "running sum": build([node("CumSum", "x a")], weights={"a": np.array(1)}),
    "columns": build([node("Slice", "x a b c")], weights={"a": np.array([1]), "b": np.array([3]), "c": np.array([1])}),
    "all rows": build(
        [node("Slice", "x a b c")], weights={"a": np.array([0]), "b": np.array([1 << 62]), "c": np.array([0])}
    ),
    "all rows as TensorFlow writes it": build(
        [node("Slice", "x a b c")],
        weights={"a": np.array([0, 0]), "b": np.array([10**9, 10**9]), "c": np.array([1, 0])},
    ),
    "a column": build([node("Gather", "x i", axis=1)], weights={"i": np.array(2)}, outputs=[("y", "FP32", ("n",))]),
    "embedding": build(
        [node("Gather", "table x")], [("x", "INT64", ("n", "t"))], [("y", "FP32", ("n", "t", 4))], {"table": W44}
    ),
    "join columns": build([node("Concat", "x x", axis=1)]),
    "split columns": build(
        [node("Split", "x", "y z", axis=1)], outputs=[("y", "FP32", ("n", 2)), ("z", "FP32", ("n", 2))]
    ),
    "pad columns": build([node("Pad", "x p")], weights={"p": np.array([0, 1, 0, 2])}),
    "repeat columns": build([node("Tile", "x r")], weights={"r": np.array([1, 3])}),
    "there and back": build([node("Transpose", "x", "t"), node("Relu", "t", "u"), node("Transpose", "u", "y")]),
    "flatten": build([node("Flatten")], [IMAGE]),
    "merge rows and time, and part them": build(
        shape_chain(
            node("Reshape", "x flat", "f"),
            node("MatMul", "f w", "g"),
            node("Concat", "b t four", "back", axis=0),
            node("Reshape", "g back", "y"),
        ),
        [SEQUENCE],
        [("y", "FP32", ("n", "t", 4))],
        {"flat": np.array([-1, 4]), "w": W44, "four": np.array([4])},
    ),
    "heads of attention": build(
        shape_chain(
            node("Concat", "b t heads", "parted", axis=0),
            node("Reshape", "x parted", "h"),
            node("Transpose", "h", "q", perm=[0, 2, 1, 3]),
            node("Transpose", "h", "k", perm=[0, 2, 3, 1]),
            node("MatMul", "q k", "scores"),
            node("Softmax", "scores", "p", axis=-1),
            node("MatMul", "p q", "c"),
            node("Transpose", "c", "d", perm=[0, 2, 1, 3]),
            node("Concat", "b t four", "back", axis=0),
            node("Reshape", "d back", "y"),
        ),
        [SEQUENCE],
        [("y", "FP32", ("n", "t", 4))],
        {"heads": np.array([2, 2]), "four": np.array([4])},
    ),
    "heads along the rows": build(
        shape_chain(
            constant("two_heads", [2]),
            node("Mul", "b two_heads", "bh"),
            node("Transpose", "x", "s1", perm=[1, 0, 2]),
            node("Concat", "t bh two", "parted", axis=0),
            node("Reshape", "s1 parted", "h"),
            node("Softmax", "h", "p", axis=0),
            node("Concat", "t b four", "back", axis=0),
            node("Reshape", "p back", "d"),
            node("Transpose", "d", "y", perm=[1, 0, 2]),
        ),
        [SEQUENCE],
        [("y", "FP32", ("n", "t", 4))],
        {"two": np.array([2]), "four": np.array([4])},
    ),
    "a state of zeros for each row": build(
        shape_chain(
            node("Concat", "b four", "z0", axis=0),
            node("ConstantOfShape", "z0", "zeros"),
            node("ReduceSum", "x a", "r", keepdims=0),
            node("Concat", "r zeros", "y", axis=1),
        ),
        [SEQUENCE],
        weights={"a": np.array([1]), "four": np.array([4])},
    ),
    "a token for each row": build(
        shape_chain(
            node("Concat", "b minus minus", "e0", axis=0),
            node("Shape", "e0", "e1"),
            node("ConstantOfShape", "e1", "ones0"),
            node("Cast", "ones0", "ones1", to=TensorProto.INT64),
            node("Add", "ones1 unit", "ones"),
            node("Equal", "e0 minus", "eq"),
            node("Where", "eq ones e0", "e"),
            node("Expand", "token e", "tokens"),
            node("Concat", "tokens x", "y", axis=1),
        ),
        [SEQUENCE],
        [("y", "FP32", ("n", "u", 4))],
        {"minus": np.array([-1]), "unit": np.array([1]), "token": np.ones((1, 1, 4))},
    ),
    "convolution": build([node("Conv", "x w", pads=[1, 1, 1, 1])], [IMAGE], weights={"w": W33}),
    "pooling": build([node("MaxPool", kernel_shape=[2, 2])], [IMAGE]),
    "batch norm": build([node("BatchNormalization", "x a b c d")], [IMAGE], weights={n: np.ones(3) for n in "abcd"}),
    "instance norm": build([node("InstanceNormalization", "x a b")], [IMAGE], weights={n: np.ones(3) for n in "ab"}),
    "layer norm": build([node("LayerNormalization", "x a")], [SEQUENCE], weights={"a": np.ones(4)}),
    "twice as large": build(
        [node("Resize", "x - s", mode="nearest")], [IMAGE], weights={"s": np.array([1.0, 1, 2, 2])}
    ),
    "pixels": build([node("DepthToSpace", blocksize=2)], [("x", "FP32", ("n", 4, 8, 8))]),
    "lstm": build(
        [
            node("Transpose", "x", "s", perm=[1, 0, 2]),
            node("LSTM", "s w r", "a b", hidden_size=3),
            node("Squeeze", "b ax", "y"),
        ],
        [SEQUENCE],
        weights={**LSTM, "ax": np.array([0])},
    ),
    "einsum": build([node("Einsum", "x w", equation="bi,ij->bj")], weights={"w": W44}),
    "one hot": build(
        [node("OneHot", "x d v")], [("x", "INT64", ("n",))], weights={"d": np.array(5), "v": np.array([0.0, 1.0])}
    ),
    "constant scale": build(
        [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")],
        weights={"s": 0.1, "z": np.array(0, np.uint8)},
    ),
    "a branch by shape": build(
        shape_chain(
            node("Equal", "t0 one", "go"),
            helper.make_node(
                "If",
                ["go"],
                ["y"],
                then_branch=helper.make_graph([node("Neg", "x", "p")], "a", [], [models.value("p", "FP32", None)]),
                else_branch=helper.make_graph([node("Abs", "x", "q")], "b", [], [models.value("q", "FP32", None)]),
            ),
        ),
        [SEQUENCE],
    ),
    "a loop of rounds": build(
        [
            helper.make_node(
                "Loop",
                ["rounds", "", "x"],
                ["y"],
                body=helper.make_graph(
                    [node("Identity", "go", "on"), node("Sin", "s", "u")],
                    "body",
                    [models.value("i", "INT64", []), models.value("go", "BOOL", []), models.value("s", "FP32", None)],
                    [models.value("on", "BOOL", []), models.value("u", "FP32", None)],
                ),
            )
        ],
        weights={"rounds": np.array(3)},
    ),
    "a function of the model": models.with_function(),
}


@pytest.mark.parametrize("name", list(INDEPENDENT))
def test_rows_are_independent(tmp_path: Path, name: str) -> None:
    assert proof(tmp_path, INDEPENDENT[name]) == (True, "")


def test_a_constant_input_that_has_a_default_is_the_default(tmp_path: Path) -> None:
    proto = onnx.load_from_string(build([node("Add", "x c")], weights={"c": np.ones((1, 4))}))
    proto.graph.input.append(models.value("c", "FP32", (1, 4)))
    assert proof(tmp_path, bytes(proto.SerializeToString())).independent


def function(axis: int) -> bytes:
    """A softmax in a function of the model's own, along an axis that its caller names."""
    inner = node("Softmax", "a", "b")
    inner.attribute.append(attribute("axis", "along"))
    made = helper.make_function("own", "Soft", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)], ["along"])
    return build([helper.make_node("Soft", ["x"], ["y"], domain="own", along=axis)], functions=[made])


def test_a_function_is_followed_with_its_callers_attributes(tmp_path: Path) -> None:
    assert proof(tmp_path, function(1)).independent
    assert "operator Softmax (output 'b') works across the rows" in proof(tmp_path, function(0)).reason


def test_a_function_that_takes_the_place_of_an_operator_ends_the_proof(tmp_path: Path) -> None:
    made = helper.make_function(
        "", "Relu", ["a"], ["b"], [node("Softmax", "a", "b", axis=0)], [helper.make_opsetid("", 17)]
    )
    assert "a function of its own for 'Relu'" in proof(tmp_path, build([node("Relu")], functions=[made])).reason


def test_a_function_that_calls_itself_ends(tmp_path: Path) -> None:
    inner = helper.make_node("Again", ["a"], ["b"], domain="own")
    made = helper.make_function("own", "Again", ["a"], ["b"], [inner, inner], [helper.make_opsetid("own", 1)])
    content = build([helper.make_node("Again", ["x"], ["y"], domain="own")], functions=[made])
    assert not proof(tmp_path, content).independent


def test_a_graph_that_needs_itself_ends(tmp_path: Path) -> None:
    assert (
        "needs its own output"
        in proof(tmp_path, build([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Neg", "b")])).reason
    )


def test_a_long_chain_is_followed_in_seconds(tmp_path: Path) -> None:
    nodes = [node("Relu", f"v{index}", f"v{index + 1}") for index in range(20_000)]
    content = build([node("Neg", "x", "v0"), *nodes, node("Abs", "v20000", "y")])
    started = time.monotonic()
    assert proof(tmp_path, content).independent
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("depth", [10, 30])
def test_graphs_in_graphs_are_followed_to_a_depth(tmp_path: Path, depth: int) -> None:
    inner = node("Relu", "x", "v0")
    for index in range(depth):
        out = [models.value(inner.output[0], "FP32", None)]
        branch = helper.make_graph([inner], "b", [], out)
        other = helper.make_graph([node("Neg", "x", f"w{index}")], "c", [], [models.value(f"w{index}", "FP32", None)])
        inner = helper.make_node("If", ["go"], [f"v{index + 1}"], then_branch=branch, else_branch=other)
    content = build([inner, node("Identity", f"v{depth}", "y")], weights={"go": np.array(True)})
    assert proof(tmp_path, content).independent == (depth == 10)


def test_names_of_a_file_are_one_line_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    hostile = helper.make_node("Softmax", ["x"], ["y"], name="a\n\x1b[2Jb" + "c" * 500, axis=0)
    reason = proof(tmp_path, build([hostile])).reason
    assert "node 'a??[2Jb" in reason
    assert reason.isprintable()
    assert len(reason) < 400


SAMPLES = [INDEPENDENT["heads of attention"], INDEPENDENT["a loop of rounds"], INDEPENDENT["lstm"], function(1)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    st.integers(0, 4000),
)
def test_damaged_files_never_raise(tmp_path: Path, sample: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(sample)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    independent, reason = proof(tmp_path, bytes(damaged[: len(damaged) - cut % 40 if cut % 3 == 0 else len(damaged)]))
    assert independent == (not reason)


def test_what_is_no_file_is_not_proven(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04", b"\x08\x09" * 40):
        assert not proof(tmp_path, content).independent
