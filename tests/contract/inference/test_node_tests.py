"""The ONNX project's node tests through the platform: each is pushed, and answered as ONNX Runtime answers it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.http.served import Served, until
from support.models.node_tests import NodeTest, difference, drawn

from tether import Client

TESTS = int(os.environ.get("TETHER_TEST_NODE_TESTS", "150"))
"""How many are drawn; 2000 are all of them."""
SEED = int(os.environ.get("TETHER_TEST_NODE_SEED", "1"))
LEAST = 0.99
"""Of them are pushed and answered equally; docs/models.md lists the others."""


def faulty(served: Served, test: NodeTest, folder: Path) -> str:
    """What is wrong with the platform's answer; empty when it is ONNX Runtime's."""
    path, name = folder / f"{test.name}.onnx", f"node-{folder.name.lower()}-{test.name[:40].lower()}"
    path.write_bytes(test.content)
    try:
        with Client(served.url, served.key) as client:
            told = client.push(name, path, labels={"test": test.name[:64]})
            until(lambda: client.model(name)["versions"][-1]["ready"], f"{name} is ready", 120)
            answer = client.infer(name, test.inputs, version=told["version"])
            client.unload(name)
        return difference(test, answer, [spec["name"] for spec in told["outputs"]])
    except Exception as error:  # noqa: BLE001 - it is counted
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_drawn_node_tests_are_pushed_and_answered_as_onnx_runtime_does(served: Served, tmp_path: Path) -> None:
    tests = list(drawn(SEED, TESTS))
    folders = [tmp_path / f"t{number}" for number in range(len(tests))]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: faulty(served, *one), zip(tests, folders, strict=True)))
    wrong = {test.name: why for test, why in zip(tests, found, strict=True) if why}
    assert len(tests) == TESTS or len(tests) > 1400
    assert len(wrong) <= len(tests) * (1 - LEAST), wrong
