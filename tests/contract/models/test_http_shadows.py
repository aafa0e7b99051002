"""Shadow versions over HTTP: which requests are copied, what is told of their answers, and what no caller notices."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import REGISTRY
from support.http.served import Served, until
from support.models import bundles, models
from support.platform.configs import configure, unconfigure
from typer.testing import CliRunner

from tether import Client
from tether.domain import api_key
from tether.model.config import ModelConfig, Shadow
from tether_cli.main import application

COUNTS = ("equal", "close", "different", "error", "unavailable", "dropped")


def pushed(served: Served, name: str, *contents: bytes) -> None:
    """Versions 1, 2 and so on; version 1 is what ``production`` stands for."""
    for content in contents:
        served.push(name, content)
    with Client(served.url, served.key) as sdk:
        sdk.promote(name, 1)
    alias = served.services.gateway.catalog.aliases
    until(lambda: alias(name).get("production") == 1, "version 1 is in production")


def shadowed(served: Served, name: str, *shadows: Shadow, **more: Any) -> None:
    served.run(configure(served.services, ModelConfig(name, shadows=shadows, **more)))


def body(value: float = 0.0) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [value] * 4}]}


def ask(http: httpx.Client, name: str, value: float = 0.0, version: str = "production", **options: Any) -> list[float]:
    answer = http.post(f"/v2/models/{name}/versions/{version}/infer", json=body(value), **options)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["outputs"][0]["data"])


def told(http: httpx.Client, name: str) -> list[dict[str, Any]]:
    answer = http.get(f"/v1/models/{name}/shadows")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return list(answer.json()["shadows"])


def counts(http: httpx.Client, name: str, index: int = 0) -> dict[str, int]:
    """Those that are not 0."""
    shown = told(http, name)[index]
    return {what: shown[what] for what in COUNTS if shown[what]}


def runs(name: str) -> float:
    return REGISTRY.get_sample_value("tether_batch_rows_sum", {"model": name}) or 0.0


@pytest.mark.parametrize(
    ("constant", "outcome", "largest"), [(1.0, "equal", 0.0), (1.0001, "close", 1e-4), (2.0, "different", 1.0)]
)
def test_a_copy_of_each_request_is_compared_with_what_the_caller_got(
    served: Served, http: httpx.Client, constant: float, outcome: str, largest: float
) -> None:
    name = f"shadow-{outcome}"
    pushed(served, name, models.add(), models.add(50.0), models.add(constant))
    shadowed(served, name, Shadow(3))
    for _ in range(3):
        assert ask(http, name) == [1.0] * 4
    until(lambda: counts(http, name) == {outcome: 3}, "all three were compared")
    (shown,) = told(http, name)
    assert (shown["version"], shown["percent"], shown["alias"], shown["last_error"]) == (3, 100.0, "", "")
    assert shown["largest_difference"] == pytest.approx(largest, rel=0.01)
    labels = {"model": name, "version": "3", "outcome": outcome}
    assert REGISTRY.get_sample_value("tether_shadow_requests_total", labels) == 3.0
    assert runs(name) == 6


def test_the_command_line_shows_the_comparison(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    pushed(served, "shadow-cli", models.add(), models.add(2.0))
    shadowed(served, "shadow-cli", Shadow(2, percent=100.0))
    ask(http, "shadow-cli")
    until(lambda: counts(http, "shadow-cli") == {"different": 1}, "it was compared")
    command = ["model", "shadows", "shadow-cli", "--url", served.url]
    shown = CliRunner().invoke(application(), command)
    assert shown.exit_code == 0, shown.output
    head, row = shown.stdout.splitlines()
    assert head.split()[:5] == ["SHADOW", "COPY", "OF", "EQUAL", "CLOSE"]
    assert row.split() == ["2", "100", "%", "of", "all", "0", "0", "1", "0", "0", "0", "1", "-"]
    told_json = CliRunner().invoke(application(), [*command, "--json"])
    assert json.loads(told_json.stdout) == told(http, "shadow-cli")


def test_requests_of_other_aliases_and_those_that_the_shadow_answers_are_not_copied(
    served: Served, http: httpx.Client
) -> None:
    name = "shadow-aliases"
    pushed(served, name, models.add(), models.add(2.0))
    shadowed(served, name, Shadow(2, alias="production"), Shadow(1, alias="latest"))
    assert ask(http, name) == [1.0] * 4
    assert ask(http, name, version="1") == [1.0] * 4
    assert ask(http, name, version="2") == [2.0] * 4
    assert ask(http, name, version="latest") == [2.0] * 4
    assert http.post(f"/v2/models/{name}/infer", json=body()).status_code == 200
    simple = {"modelId": name, "inputData": [[0.0] * 4]}
    assert http.post("/v1/inference", json=simple).status_code == 200
    assert http.post("/v1/inference", json={**simple, "version": "production"}).status_code == 200
    until(lambda: [counts(http, name, at) for at in (0, 1)] == [{"different": 2}, {"different": 3}], "five copies")
    with Client(served.url, served.key) as sdk:
        sdk.promote(name, 2)
    until(lambda: ask(http, name) == [2.0] * 4, "version 2 is in production")
    settled(served)
    before = counts(http, name)
    assert ask(http, name) == [2.0] * 4
    settled(served)
    assert counts(http, name) == before


def settled(served: Served) -> None:
    shadows = served.services.gateway.features.shadows
    until(lambda: shadows.under_way == 0, "no copy is under way")


def test_a_part_of_the_requests_is_a_part(served: Served, http: httpx.Client) -> None:
    name = "shadow-part"
    pushed(served, name, models.add(), models.add(2.0))
    shadowed(served, name, Shadow(2, percent=0.0), Shadow(2, percent=50.0))
    for _ in range(200):
        ask(http, name)
    settled(served)
    assert counts(http, name) == {}
    assert 50 < counts(http, name, 1)["different"] < 150


def test_durable_jobs_and_answers_that_were_kept_are_not_copied(served: Served, http: httpx.Client) -> None:
    name = "shadow-kept"
    pushed(served, name, models.add(), models.add(2.0))
    shadowed(served, name, Shadow(2), cache_ttl_s=600.0)
    for _ in range(5):
        assert ask(http, name) == [1.0] * 4
    job = http.post("/v1/jobs", json={"model": name, "version": "production", **body()}).json()
    assert http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()["state"] == "succeeded"
    settled(served)
    assert counts(http, name) == {"different": 1}
    assert runs(name) == 3


CODE = """
import os, time
import numpy as np


class Model:
    def predict(self, inputs):
        x = inputs["x"]
        if x.size and x.min() == 13:
            raise ValueError("unlucky")
        while x.size and x.min() == -7777 and not os.path.exists(GATE):
            time.sleep(0.01)
        return {"y": x + np.float32(1)}
"""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """What does not exist yet, and does when the test has ended."""
    path = tmp_path / "gate"
    yield path
    path.touch()


def test_a_shadow_that_hangs_holds_up_no_caller_and_costs_nobody_anything(
    served: Served, http: httpx.Client, tmp_path: Path, gate: Path
) -> None:
    name, most = "shadow-hung", served.services.settings.shadow_inflight
    gateway = served.services.gateway
    served.push(name, models.add())
    with Client(served.url, served.key) as sdk:
        sdk.promote(name, 1)
        sdk.push(name, bundles.write(tmp_path / "bundle", code=f"GATE = {str(gate)!r}\n{CODE}"), run_timeout_s=60.0)
    until(lambda: http.get(f"/v2/models/{name}/versions/2/ready").status_code == 200, "version 2 is ready", 60)
    shadowed(served, name, Shadow(2))
    text = api_key.new_key_text()
    record = api_key.stored_key(text, tenant="acme", scopes=("infer",), name="n", created_at=time.time())
    served.run(gateway.keys.store(msgspec.structs.replace(record, rate=0.001, burst=most + 20, concurrency=2)))
    for _ in range(most + 20):
        assert ask(http, name, -7777.0, headers={"x-api-key": text}) == [-7776.0] * 4
    assert gateway.features.shadows.under_way == most
    assert gateway._bundler.held == gateway.inflight == 0
    assert counts(http, name) == {"dropped": 20}
    gate.touch()
    until(lambda: counts(http, name) == {"dropped": 20, "equal": most}, "the copies were compared", 60)
    assert gateway.features.shadows._bytes == gateway.features.shadows.under_way == 0
    assert REGISTRY.get_sample_value("tether_infer_seconds_count", {"model": name}) == most + 20

    def audited() -> int:
        query: dict[str, str | int] = {"kind": "inference", "model": name, "limit": 1000}
        return len(http.get("/v1/audit", params=query).json()["entries"])

    until(lambda: audited() >= most + 20, "all requests are in the log")
    assert audited() == most + 20
    assert ask(http, name, 13.0) == [14.0] * 4
    until(lambda: counts(http, name).get("error") == 1, "the shadow failed")
    assert told(http, name)[0]["last_error"] == "inference_failed"


def test_a_shadow_that_cannot_take_the_request_or_is_not_there_is_counted(served: Served, http: httpx.Client) -> None:
    name = "shadow-unfit"
    pushed(served, name, models.add(), models.add(2.0, width=5))
    shadowed(served, name, Shadow(2), Shadow(7))
    assert ask(http, name) == [1.0] * 4
    until(lambda: counts(http, name) == {"error": 1}, "it does not fit")
    assert told(http, name)[0]["last_error"] == "bad_tensor"
    assert counts(http, name, 1) == {"unavailable": 1}


def test_requests_that_fail_are_not_copied(served: Served, http: httpx.Client) -> None:
    name = "shadow-of-failure"
    pushed(served, name, models.gather(), models.identity("INT64", ("n", 1)))
    shadowed(served, name, Shadow(2))
    tensor = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [99]}
    answer = http.post(f"/v2/models/{name}/versions/1/infer", json={"inputs": [tensor]})
    assert answer.json()["code"] == "inference_failed"
    settled(served)
    assert counts(http, name) == {}


def test_a_shadow_keeps_its_counts_for_as_long_as_it_is_the_same(served: Served, http: httpx.Client) -> None:
    name = "shadow-changed"
    pushed(served, name, models.add(), models.add(2.0))
    assert told(http, name) == []
    shadowed(served, name, Shadow(2), revision=1)
    ask(http, name)
    until(lambda: counts(http, name) == {"different": 1}, "it was compared")
    shadowed(served, name, Shadow(2), revision=2, cache_ttl_s=0.0, pinned=True)
    assert counts(http, name) == {"different": 1}
    shadowed(served, name, Shadow(2, percent=99.0), revision=3)
    assert counts(http, name) == {}
    served.run(unconfigure(served.services, name))
    assert told(http, name) == []
    before = runs(name)
    ask(http, name)
    settled(served)
    assert runs(name) == before + 1
    assert http.get("/v1/models/no-such-model/shadows").status_code == 404
