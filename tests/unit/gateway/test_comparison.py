"""How the answers of two versions compare."""

from __future__ import annotations

import numpy as np
import pytest

from tether.domain.tensor import Tensor, from_numpy
from tether.gateway_http.inference.output_comparison import TOLERANCES, Comparison, Verdict, compare


def answer(**outputs: object) -> tuple[Tensor, ...]:
    return tuple(from_numpy(name, np.asarray(array)) for name, array in outputs.items())


def floats(*numbers: float, dtype: type = np.float32) -> np.ndarray:
    return np.array(numbers, dtype)


def test_the_same_bytes_are_equal_in_whatever_order_the_outputs_come() -> None:
    one = answer(label=np.array([7]), scores=floats(0.25, float("nan")))
    assert compare(one, tuple(reversed(one))) == Comparison(Verdict.EQUAL, 0.0)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"y": floats(1.0)}, {}),
        ({"y": floats(1.0)}, {"z": floats(1.0)}),
        ({"y": floats(1.0)}, {"y": floats(1.0), "z": floats(1.0)}),
        ({"y": floats(1.0)}, {"y": floats(1.0, dtype=np.float64)}),
        ({"y": floats(1.0, 2.0)}, {"y": floats(1.0, 2.0).reshape(2, 1)}),
        ({"y": np.array([1])}, {"y": np.array([2])}),
        ({"y": np.array([b"cat"])}, {"y": np.array([b"dog"])}),
        ({"y": np.array([True])}, {"y": np.array([False])}),
    ],
)
def test_another_name_type_shape_or_whole_number_is_different(
    given: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> None:
    assert compare(answer(**given), answer(**other)).verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_may_differ_by_their_tolerance_and_no_more(dtype: type) -> None:
    one = from_numpy("y", np.array([100.0], dtype))
    relative = TOLERANCES[one.datatype].relative
    near = from_numpy("y", np.array([100.0 * (1 + relative * 0.8)], dtype))
    far = from_numpy("y", np.array([100.0 * (1 + relative * 1.5)], dtype))
    assert compare((one,), (near,)).verdict is Verdict.CLOSE
    found = compare((one,), (far,))
    assert found.verdict is Verdict.DIFFERENT
    assert found.difference == pytest.approx(100 * relative * 1.5, rel=0.2)


def test_half_precision_of_both_kinds_is_understood() -> None:
    one = Tensor("y", "BF16", (1,), b"\x80\x3f")
    assert compare((one,), (Tensor("y", "BF16", (1,), b"\x81\x3f"),)) == Comparison(Verdict.CLOSE, 0.0078125)


@pytest.mark.parametrize(
    ("given", "other", "verdict"),
    [
        (0.0, -0.0, Verdict.CLOSE),
        (0.0, 1e-6, Verdict.CLOSE),
        (1.0, float("nan"), Verdict.DIFFERENT),
        (float("nan"), 1.0, Verdict.DIFFERENT),
        (float("inf"), float("-inf"), Verdict.DIFFERENT),
        (float("inf"), 1.0, Verdict.DIFFERENT),
    ],
)
def test_zeros_and_numbers_that_are_none(given: float, other: float, verdict: Verdict) -> None:
    found = compare(answer(y=floats(given, 5.0)), answer(y=floats(other, 5.0)))
    assert found.verdict is verdict
    assert 0.0 <= found.difference <= 1e-6


def test_nan_with_other_bits_is_still_nan() -> None:
    other = Tensor("y", "FP32", (1,), np.array([0x7FC00001], "<u4").tobytes())
    assert compare(answer(y=floats(float("nan"))), (other,)) == Comparison(Verdict.CLOSE, 0.0)


def test_every_output_counts_and_every_element() -> None:
    """One far number behind many near ones, beyond the slice that is looked at first."""
    size = (1 << 18) + 5
    one, two = np.zeros(size, np.float32), np.zeros(size, np.float32)
    two[-1] = 3.0
    assert compare(answer(a=floats(1.0), y=one), answer(a=floats(1.0000001), y=two)) == Comparison(
        Verdict.DIFFERENT, 3.0
    )
    assert compare(answer(a=floats(1.0), y=one), answer(a=floats(1.0000001), y=one)).verdict is Verdict.CLOSE


def test_an_answer_whose_bytes_do_not_fit_its_shape_is_different() -> None:
    assert compare(answer(y=floats(1.0)), (Tensor("y", "FP32", (1,), b"\0\0"),)).verdict is Verdict.DIFFERENT
