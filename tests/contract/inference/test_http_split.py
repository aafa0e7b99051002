"""Inputs that are too large for one request: sent as several where the model's rows are independent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.http.served import Served, served
from support.models import models
from typer.testing import CliRunner

from tether import AsyncClient, Client
from tether.broker.embedded_server import Binary
from tether.errors import BadTensor, PayloadTooLarge
from tether_cli.main import application

ROWS = np.random.default_rng(7).normal(size=(600, 4)).astype(np.float32)
"""9,600 bytes."""


@pytest.fixture(scope="module")
def narrow(nats_binary: Binary) -> Iterator[Served]:
    """A platform whose requests have at most 4,096 bytes."""
    with served(nats_binary, max_body_bytes=4096) as running:
        running.push("add", models.add(), max_batch_size=8)
        running.push("whole", models.add(2.0), max_batch_size=0)
        running.push("texts", models.identity("BYTES", ("n",)), max_batch_size=4)
        yield running


async def test_rows_of_a_batched_model_are_sent_as_several_requests_and_come_back_in_order(narrow: Served) -> None:
    with Client(narrow.url, narrow.key) as client:
        found = client.infer("add", ROWS)["y"]
        np.testing.assert_array_equal(found, ROWS + np.float32(1.0))
    async with AsyncClient(narrow.url, narrow.key) as other:
        np.testing.assert_array_equal((await other.infer("add", {"x": ROWS}))["y"], found)


def test_the_command_line_sends_600_rows(narrow: Served, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    settings = {"TETHER_URL": narrow.url, "TETHER_API_KEY": narrow.key}
    told = CliRunner().invoke(application(), ["infer", "add", str(tmp_path / "rows.npy"), "--json"], env=settings)
    assert told.exit_code == 0, told.output
    np.testing.assert_allclose(json.loads(told.stdout)["y"], ROWS + 1.0, rtol=1e-6)


def test_rows_of_unequal_size_are_sent_in_parts_that_fit(narrow: Served) -> None:
    texts = np.array([b"s"] * 20 + [b"l" * 3000] * 3 + [b"e" * 1000] * 4, dtype=object)
    with Client(narrow.url, narrow.key) as client:
        assert list(client.infer("texts", texts).popitem()[1]) == list(texts)
        with pytest.raises(PayloadTooLarge, match=r"4096 bytes"):
            client.infer("texts", np.array([b"s", b"x" * 5000], dtype=object))


def test_what_may_depend_on_other_rows_is_not_split_and_the_error_says_so(narrow: Served) -> None:
    with Client(narrow.url, narrow.key) as client:
        with pytest.raises(
            PayloadTooLarge, match=r"model 'whole' is not batched, so its rows may depend on one another"
        ):
            client.infer("whole", ROWS)
        with pytest.raises(PayloadTooLarge, match=r"setting max_body_bytes\)$"):
            client.infer("add", ROWS.reshape(1, 2400))
    with Client(narrow.url, narrow.new_key("infer")) as lesser, pytest.raises(PayloadTooLarge, match="models:read"):
        lesser.infer("add", {"x": ROWS})


def test_more_rows_than_a_request_may_have_are_sent_as_several(served: Served, sdk: Client) -> None:
    served.push("row-by-row", models.add(), max_batch_size=1)
    rows = np.repeat(ROWS, 7, axis=0)
    whole = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [4200, 4], "data": rows.tolist()}]}
    with served.client() as http:
        refused = http.post("/v2/models/row-by-row/infer", json=whole)
    assert (refused.status_code, "accepts at most 4096 in one request" in refused.text) == (400, True)
    np.testing.assert_array_equal(sdk.infer("row-by-row", rows, timeout=60)["y"], rows + np.float32(1.0))
    with pytest.raises(BadTensor, match=r"'x'"):
        sdk.infer("row-by-row", {"x": np.ones((5000, 3), np.float32)})
