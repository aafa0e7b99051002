"""Compares the outputs of two versions for the same request. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from tether.domain.tensor import NUMPY_DTYPES, Tensor
from tether.gateway_http.bundling.pending_request import Answer


class Verdict(StrEnum):
    """Result of one mirrored request. Closed."""

    EQUAL = "equal"  # every output is equal to the byte
    CLOSE = "close"  # floating-point numbers differ within their tolerance, all else is equal
    DIFFERENT = "different"
    ERROR = "error"  # the request does not fit the shadow's signature, or the shadow failed
    UNAVAILABLE = "unavailable"  # not sent: no worker hosts the shadow version
    DROPPED = "dropped"  # not sent: too many mirrored requests in flight, or the gateway is busy


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
"""Tolerances by datatype; elements of all other datatypes must be equal."""

_SLICE = 1 << 18
"""Elements compared at a time, so that temporary arrays stay small for large tensors."""


class Comparison(NamedTuple):
    """A verdict, and the largest finite difference of two numbers; 0 if there is none."""

    verdict: Verdict
    difference: float


def compare(given: Answer, other: Answer) -> Comparison:
    """Compare the outputs that a caller got with another version's, matched by name."""
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
        close, largest = _compare_numbers(tensor, twin)
        difference = max(difference, largest)
        if not close:
            verdict = Verdict.DIFFERENT
        elif verdict is Verdict.EQUAL:
            verdict = Verdict.CLOSE
    return Comparison(verdict, difference)


def _compare_numbers(tensor: Tensor, twin: Tensor) -> tuple[bool, float]:
    """Return whether all numbers are close, and the largest finite difference. NaN equals NaN only."""
    parts = list(_compare_slices(tensor, twin))
    return all(close for close, _ in parts), max((largest for _, largest in parts), default=0.0)


def _compare_slices(tensor: Tensor, twin: Tensor) -> Iterator[tuple[bool, float]]:
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
