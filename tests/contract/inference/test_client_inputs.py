"""What the client takes as inputs: bare arrays, lists, and the datatypes that numpy makes by itself."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from support.http.oip_cases import MODELS
from support.http.served import Served
from support.models import models

from tether import AsyncClient, Client
from tether.errors import BadTensor, InvalidRequest

PLUS = "client-plus"
VALUES = [[1.0, 2.0, 3.0, 4.0]]


@pytest.fixture(scope="module", autouse=True)
def pushed(served: Served) -> None:
    served.push(PLUS, models.add())
    for datatype in ("FP16", "FP64", "INT32", "INT64", "BYTES"):
        served.push(f"client-{datatype.lower()}", models.identity(datatype))


FITTING = [
    VALUES,
    np.array(VALUES),
    np.array(VALUES, np.float32),
    np.array(VALUES, np.int64),
    {"x": np.array(VALUES)},
    {"x": VALUES},
]


@pytest.mark.parametrize(
    "given", FITTING, ids=[f"{type(given).__name__}-{place}" for place, given in enumerate(FITTING)]
)
async def test_the_only_input_needs_no_name_and_default_dtypes_are_converted(
    sdk: Client, served: Served, given: Any
) -> None:
    wanted = np.array(VALUES) + 1
    np.testing.assert_array_equal(sdk.infer(PLUS, given)["y"], wanted)
    np.testing.assert_array_equal(sdk.submit(PLUS, given).result(30)["y"], wanted)
    async with AsyncClient(served.url, served.key) as client:
        np.testing.assert_array_equal((await client.infer(PLUS, given))["y"], wanted)
    jobs = sdk.submit_many(PLUS, [given, given])
    assert [np.array_equal(job.result(30)["y"], wanted) for job in jobs] == [True, True]


@pytest.mark.parametrize("datatype", ["fp16", "fp64", "int32", "int64"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_values_that_the_datatype_can_hold_are_converted(sdk: Client, datatype: str, dtype: npt.DTypeLike) -> None:
    found = sdk.infer(f"client-{datatype}", np.array(VALUES, dtype))
    np.testing.assert_array_equal(next(iter(found.values())), VALUES)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (PLUS, np.array([[1e300, 0, 0, 0]]), "does not fit FP32"),
        ("client-int32", np.array([[0.5, 0, 0, 0]]), "does not fit INT32"),
        ("client-int32", np.array([[1 << 40, 0, 0, 0]]), "does not fit INT32"),
        ("client-bytes", np.array(VALUES), "BYTES"),
        (PLUS, np.array(VALUES, np.int32), "has datatype INT32; the model expects FP32"),
    ],
)
def test_values_that_would_change_are_refused_by_name(sdk: Client, model: str, given: Any, words: str) -> None:
    with pytest.raises(BadTensor, match=words) as caught:
        sdk.infer(model, given)
    assert "'x'" in caught.value.message


def test_an_input_without_a_name_needs_a_model_that_has_one(served: Served, sdk: Client) -> None:
    served.push("client-two", MODELS["two"])
    with pytest.raises(InvalidRequest, match=r"the model has the inputs .*; pass them by name"):
        sdk.infer("client-two", VALUES)


def test_arrays_that_fit_cost_one_request(sdk: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    real = httpx.Client.request

    def counted(client: httpx.Client, method: str, **more: Any) -> httpx.Response:
        sent.append(method)
        return real(client, method, **more)

    monkeypatch.setattr(httpx.Client, "request", counted)
    sdk.infer(PLUS, {"x": np.array(VALUES, np.float32)})
    sdk.infer("client-fp64", {"x": np.array(VALUES)})
    assert sent == ["POST", "POST"]
    sdk.infer(PLUS, {"x": np.array(VALUES)})
    assert sent[2:] == ["POST", "GET", "POST"]
