"""Trial runs show that rows depend on one another where a few benign rows do not, and accuse no model of its rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES
from tether.modelstore.inspection import row_trials
from tether.modelstore.inspection.row_trials import Tried, trial

Body = Callable[[Any], Any]


def tried(body: Body, datatype: str = "FP32", shape: tuple[int, ...] = (-1, 4), *, rows: bool = True) -> Tried:
    """Trials of a model with one input and one output."""
    spec = TensorSpec("x", datatype, shape)
    return trial(lambda arrays: [np.asarray(body(arrays["x"]))], [spec], ["y"], rows=rows)


def noting(seen: list[Any]) -> Body:
    """A model that gives back what it gets, and remembers it."""

    def body(x: Any) -> Any:
        seen.append(x.copy())
        return x

    return body


def cut(x: Any) -> Any:
    """Only for even widths of at least 9."""
    if x.shape[1] < 9 or x.shape[1] % 2:
        raise ValueError(x.shape)
    return x - x.mean(0)


def lengths(x: Any) -> Any:
    return np.array([[len(text) for text in row] for row in x.tolist()], np.int64)


MIXES: dict[str, tuple[Body, str, tuple[int, ...]]] = {
    "less the mean": (lambda x: x - x.mean(0), "FP32", (-1, 4)),
    "less the mean, in small numbers": (lambda x: (x - x.mean(0)) * np.float32(1e-9), "FP32", (-1, 4)),
    "by the largest, if it is large": (lambda x: x / max(np.abs(x).max(), 255), "FP32", (-1, 3)),
    "by the smallest, if it is small": (lambda x: x / min(np.abs(x).min(), 1e-4), "FP32", (-1, 3)),
    "in BF16": (lambda x: (x - x.astype(np.float32).mean(0)).astype(NUMPY_DTYPES["BF16"]), "BF16", (-1, 2)),
    "in FP16": (lambda x: x - x.mean(0), "FP16", (-1, 2)),
    "of a size that few take": (cut, "FP32", (-1, -1)),
    "steps": (lambda x: (x[:, 1:] - x[:, :-1]) - (x[:, 1:] - x[:, :-1]).mean(0), "FP32", (-1, -1)),
    "large whole numbers only": (lambda x: np.where(x > 1 << 20, x.max(0), x), "INT32", (-1, 4)),
    "negative whole numbers only": (lambda x: np.where(x < 0, x.sum(0), x), "INT64", (-1, 4)),
    "the longest text": (lambda x: lengths(x).max() - lengths(x), "BYTES", (-1, 2)),
    "rows in order": (lambda x: np.sort(x, 0), "FP32", (-1, 4)),
    "fewer rows": (lambda x: x[x[:, 0] > 0], "FP32", (-1, 4)),
    "one number": (lambda x: x.sum(), "FP32", (-1, 4)),
    "one row only": (lambda x: x.reshape(1, 4), "FP32", (-1, 4)),
}


@pytest.mark.parametrize("name", list(MIXES))
def test_rows_that_mix_are_seen(name: str) -> None:
    body, datatype, shape = MIXES[name]
    assert tried(body, datatype, shape).refuted


def blocks(x: Any) -> Any:
    """A product that is added up in another order when there are more rows, as libraries do."""
    weights = np.linspace(-1, 1, x.shape[1], dtype=np.float32)
    if len(x) > 2:
        return ((x * weights)[:, ::-1]).sum(1, dtype=np.float32)
    return (x * weights).sum(1, dtype=np.float32)


KEEPS: dict[str, tuple[Body, str, tuple[int, ...]]] = {
    "twice": (lambda x: x * 2, "FP32", (-1, 4)),
    "another order of sums": (blocks, "FP32", (-1, 400)),
    "a sine of large numbers": (lambda x: np.sin(blocks(x)), "FP32", (-1, 400)),
    "a sign of sums": (lambda x: np.sign(blocks(x)).astype(np.int64), "FP32", (-1, 400)),
    "not a number": (np.sqrt, "FP32", (-1, 4)),
    "infinite": (lambda x: np.exp(x.astype(np.float32)), "FP32", (-1, 4)),
    "whole numbers": (lambda x: x // 3, "UINT8", (-1, 4)),
    "lengths of texts": (lengths, "BYTES", (-1, 2)),
    "nothing": (lambda x: x[:, :0], "FP32", (-1, 4)),
}


@pytest.mark.parametrize("name", list(KEEPS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_do_not_mix_are_not_accused(name: str) -> None:
    body, datatype, shape = KEEPS[name]
    found = tried(body, datatype, shape)
    assert (found.refuted, found.error) == ("", None)
    assert found.outputs is not None


@pytest.mark.parametrize("datatype", [name for name in NUMPY_DTYPES if "INT" in name])
def test_whole_numbers_are_neither_zero_nor_the_least(datatype: str) -> None:
    """ONNX Runtime divides by them, and its process ends."""
    seen: list[Any] = []
    tried(noting(seen), datatype)
    every = np.concatenate([array.ravel() for array in seen])
    assert every.size > 100
    assert not np.any(every == 0)
    if datatype.startswith("INT"):
        assert every.min() < 0
        assert not np.any(every == np.iinfo(every.dtype).min)
    assert every.max() > np.iinfo(every.dtype).max // 4


def test_rows_are_of_many_scales() -> None:
    seen: list[Any] = []
    tried(noting(seen))
    largest = np.abs(max(seen, key=len)).max(1)
    assert largest.min() < 1e-4
    assert largest.max() > 1e4


def test_a_slow_model_is_not_run_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_trials, "SECONDS", 0.0)
    runs: list[Any] = []
    found = tried(noting(runs), "INT64", (-1, -1))
    assert found.refuted == ""
    assert len(runs) == 1


def test_the_first_error_is_told_when_nothing_runs() -> None:
    def fails(x: Any) -> Any:
        raise ValueError(len(x))

    found = tried(fails)
    assert isinstance(found.error, ValueError)
    assert found.outputs is None
    assert found.refuted == ""


def test_a_model_without_rows_is_run_once_and_not_compared() -> None:
    runs: list[Any] = []
    found = tried(noting(runs), "FP32", (2, 4), rows=False)
    assert ([len(run) for run in runs], found.refuted) == ([2], "")
