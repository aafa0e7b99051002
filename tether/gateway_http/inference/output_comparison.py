"""How two versions' answers to the same request compare. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from tether.domain.tensor import NUMPY_DTYPES, Tensor
from tether.gateway_http.bundling.pending_request import Answer


class Verdict(StrEnum):
    """What became of a copy. Closed."""

    EQUAL = "equal"  # every output to the byte
    CLOSE = "close"  # floating-point numbers differ by no more than their tolerance, all else is equal
    DIFFERENT = "different"
    ERROR = "error"  # the request does not fit the shadow's signature, or got no answer from it
    UNAVAILABLE = "unavailable"  # not sent: nobody holds the shadow version
    DROPPED = "dropped"  # not sent: too many copies are under way, or the gateway is busy


class Tolerance(NamedTuple):
    """Numbers ``a`` and ``b`` are close when ``|a - b| <= absolute + relative * |a|``."""

    relative: float
    absolute: float


TOLERANCES = {
    "FP64": Tolerance(1e-3, 1e-5),
    "FP32": Tolerance(1e-3, 1e-5),
    "FP16": Tolerance(1e-2, 1e-3),
    "BF16": Tolerance(2e-2, 1e-2),
}
"""Of datatypes whose numbers may differ a little; elements of all others are equal or different."""

_SLICE = 1 << 18
"""Elements compared at a time, so that large tensors do not take their size again several times over."""


class Comparison(NamedTuple):
    """A verdict, and the largest difference of two numbers that have one; 0 when none differ."""

    verdict: Verdict
    difference: float


def compare(given: Answer, other: Answer) -> Comparison:
    """Compare what a caller was given with another version's answer, by the names of the outputs."""
    twins = {tensor.name: tensor for tensor in other}
    verdict, difference = Verdict.EQUAL, 0.0
    if len(twins) != len(given):
        return Comparison(Verdict.DIFFERENT, 0.0)
    for tensor in given:
        twin = twins.get(tensor.name)
        if twin is None or (twin.datatype, twin.shape) != (tensor.datatype, tensor.shape):
            return Comparison(Verdict.DIFFERENT, difference)
        if twin.data == tensor.data:
            continue
        if tensor.datatype not in TOLERANCES or len(twin.data) != len(tensor.data):
            return Comparison(Verdict.DIFFERENT, difference)
        close, largest = _numbers(tensor, twin)
        difference = max(difference, largest)
        if not close:
            verdict = Verdict.DIFFERENT
        elif verdict is Verdict.EQUAL:
            verdict = Verdict.CLOSE
    return Comparison(verdict, difference)


def _numbers(tensor: Tensor, twin: Tensor) -> tuple[bool, float]:
    """Whether all numbers are close, and the largest finite difference. NaN is like NaN, and like nothing else."""
    parts = list(_parts(tensor, twin))
    return all(close for close, _ in parts), max((largest for _, largest in parts), default=0.0)


def _parts(tensor: Tensor, twin: Tensor) -> Iterator[tuple[bool, float]]:
    dtype, tolerance = NUMPY_DTYPES[tensor.datatype], TOLERANCES[tensor.datatype]
    ours, theirs = np.frombuffer(tensor.data, dtype), np.frombuffer(twin.data, dtype)
    for start in range(0, len(ours), _SLICE):
        one = ours[start : start + _SLICE].astype(np.float64)
        two = theirs[start : start + _SLICE].astype(np.float64)
        differ = ~((one == two) | (np.isnan(one) & np.isnan(two)))
        one, two = one[differ], two[differ]
        with np.errstate(all="ignore"):
            apart = np.abs(one - two)
            allowed = tolerance.absolute + tolerance.relative * np.abs(one)
        finite = np.isfinite(apart)
        largest = float(apart[finite].max(initial=0.0))
        yield bool(finite.all() and (apart <= allowed).all()), largest if math.isfinite(largest) else 0.0
