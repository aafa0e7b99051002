"""Two tenants ask for models whose rows depend on one another, all at once: each gets what the model gives it alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from prometheus_client import REGISTRY
from support.models import mixing, models
from support.platform.services import Services

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, from_numpy, to_numpy
from tether.frameworks.onnx.values import from_value, to_value
from tether.gateway_http.models.catalog import ResolvedVersion

REQUESTS = int(os.environ.get("TETHER_TEST_ROW_REQUESTS", "60"))
"""Of each tenant, for each model."""
TENANTS = ("acme", "globex")
OPEN = 9
"""Size of axes that a model leaves open: alike in all requests, so that nothing but the proof keeps them apart."""
TEXTS = np.array(["", "word", "two words", "a text of five words"], np.object_)

Arrays = Mapping[str, Any]


def request(served: ResolvedVersion, tenant: int, number: int) -> dict[str, Any]:
    """1 to 3 rows of a scale of their own, some of them large, so that one row's numbers show in another's answer."""
    draw = np.random.default_rng([tenant, number])
    rows = 1 + number % 3
    return {spec.name: values(spec, rows, draw, 10.0 ** (number % 6 - 2)) for spec in served.manifest.inputs}


def values(spec: TensorSpec, rows: int, draw: np.random.Generator, scale: float) -> Any:
    shape = [rows, *[OPEN if size == -1 else size for size in spec.shape[1:]]]
    if spec.datatype == "BYTES":
        return draw.choice(TEXTS, shape)
    return (draw.standard_normal(shape) * scale).astype(NUMPY_DTYPES[spec.datatype])


class Alone:
    """The model itself, with nothing around it."""

    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self._session.get_outputs()]

    def run(self, arrays: Arrays) -> list[Any]:
        if any(array.dtype == np.object_ for array in arrays.values()):
            return list(self._session.run(None, dict(arrays)))
        given = {name: to_value(array) for name, array in arrays.items()}
        return [from_value(one) for one in self._session.run_with_ort_values(None, given)]


async def ask(running: Services, served: ResolvedVersion, tenant: int, arrays: Arrays) -> list[Any]:
    inputs = tuple(from_numpy(name, array) for name, array in arrays.items())
    answer = await running.gateway.infer(served, TENANTS[tenant], inputs, (), request_id="test", timeout_s=120)
    return [to_numpy(tensor) for tensor in answer]


def differ(expected: Sequence[Any], found: Sequence[Any]) -> bool:
    return any(one.shape != other.shape or not alike(one, other) for one, other in zip(expected, found, strict=True))


def alike(one: Any, other: Any) -> bool:
    if one.dtype.kind == "O":
        return [text.encode() for text in one.flat] == list(other.flat)
    if one.dtype.kind not in "fV":
        return bool((one == other).all())
    a, b = one.astype(np.float64), other.astype(np.float64)
    return bool(np.allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max(initial=0), equal_nan=True))


def runs(model: str) -> float:
    return REGISTRY.get_sample_value("tether_batch_rows_count", {"model": model}) or 0.0


async def answered(running: Services, name: str, content: bytes) -> tuple[int, int]:
    """How many answers differ from the model's own, and how many runs there were."""
    served = await running.push(name, content)
    alone, before = Alone(content), runs(name)
    asked = [(tenant, request(served, tenant, number)) for number in range(REQUESTS) for tenant in range(len(TENANTS))]
    found = await asyncio.gather(*[ask(running, served, tenant, arrays) for tenant, arrays in asked])
    wrong = [differ(alone.run(arrays), answer) for (_, arrays), answer in zip(asked, found, strict=True)]
    return sum(wrong), int(runs(name) - before)


@pytest.mark.parametrize("name", list(mixing.MODELS))
async def test_two_tenants_at_once_get_what_the_model_gives_each_alone(one: Services, name: str) -> None:
    wrong, count = await answered(one, "mixing", mixing.MODELS[name][0])
    assert wrong == 0
    assert count == REQUESTS * len(TENANTS)


async def test_requests_that_are_asked_so_are_joined_where_rows_are_independent(one: Services) -> None:
    """Else the test above would show nothing."""
    wrong, count = await answered(one, "apart", models.add())
    assert wrong == 0
    assert count < REQUESTS * len(TENANTS) / 2
