"""The ONNX project's own tests of single operators (``onnx.backend.test``), as models to push and answers to expect."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class NodeTest(NamedTuple):
    """A model, its inputs by name, and what ONNX Runtime answers, in the order of its outputs."""

    name: str
    content: bytes
    inputs: dict[str, Any]
    answers: list[Any]


@functools.cache
def collected() -> tuple[Any, ...]:
    """Every test of the project, in the order of names. Takes some 20 s."""
    from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415 - it makes them all

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        return tuple(sorted(collect_testcases(None), key=lambda test: str(test.name)))


def drawn(seed: int, most: int) -> Iterator[NodeTest]:
    """Tests that ONNX Runtime passes, in an order drawn with a seed; at most so many."""
    order = list(collected())
    random.Random(seed).shuffle(order)
    return itertools.islice(filter(None, map(passed, order)), most)


def passed(test: Any) -> NodeTest | None:
    """A test whose inputs and outputs are tensors and that ONNX Runtime itself passes; else None."""
    import onnxruntime  # noqa: PLC0415 - only who looks at tests

    inputs, outputs = test.data_sets[0]
    if not all(isinstance(one, np.ndarray | np.generic) for one in (*inputs, *outputs)):
        return None
    content = test.model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    names = [one.name for one in test.model.graph.input]
    given = {name: np.asarray(array) for name, array in zip(names, inputs, strict=False)}
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        answers = session.run(None, given)
    except Exception:  # noqa: BLE001 - whatever it does not do
        return None
    same = len(answers) == len(outputs) and all(
        isinstance(answer, np.ndarray) and _close(answer, np.asarray(expected), test.rtol, test.atol)
        for answer, expected in zip(answers, outputs, strict=True)
    )
    return NodeTest(test.name, content, given, answers) if same else None


def _close(answer: Any, expected: Any, rtol: float, atol: float) -> bool:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    if answer.dtype.kind not in "fc":
        return bool(np.array_equal(answer, expected))
    return bool(np.allclose(answer, expected, rtol=rtol, atol=atol, equal_nan=True))


def difference(test: NodeTest, found: dict[str, Any], names: list[str]) -> str:
    """What an answer has that is not ONNX Runtime's; empty when they are equal."""
    for name, expected in zip(names, test.answers, strict=True):
        got = found[name]
        if got.dtype.kind == "O":  # text travels as bytes
            got = np.array([one.decode() for one in got.ravel()], np.object_).reshape(got.shape)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"output '{name}' is {got.dtype} of {got.shape}, not {expected.dtype} of {expected.shape}"
        if not np.array_equal(got, expected, equal_nan=got.dtype.kind == "f"):
            return f"output '{name}' differs"
    return ""
