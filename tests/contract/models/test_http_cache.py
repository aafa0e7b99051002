"""The response cache over HTTP: who gets an answer that was computed before, and who never does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import numpy as np
from prometheus_client import REGISTRY
from support.http.served import Served, until
from support.models import models
from support.platform.configs import configure, unconfigure

from tether import Client
from tether.domain import api_key
from tether.domain.tenant import Tenant
from tether.model.config import ModelConfig
from tether.wire import oip


def cached(served: Served, name: str, content: bytes | None = None, *, ttl_s: float = 600.0) -> None:
    """A model whose answers are kept."""
    served.push(name, models.add() if content is None else content)
    served.share(name)
    served.run(configure(served.services, ModelConfig(name, revision=1, cache_ttl_s=ttl_s)))


def body(value: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [value] * 4}], **more}


def ask(
    http: httpx.Client, name: str, value: float = 0.0, version: str = "", headers: dict[str, str] | None = None
) -> tuple[str, float]:
    """What ``x-tether-cache`` says, and the first number of the answer."""
    path = f"/v2/models/{name}/versions/{version}" if version else f"/v2/models/{name}"
    answer = http.post(f"{path}/infer", json=body(value), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-tether-cache", ""), answer.json()["outputs"][0]["data"][0]


def runs(name: str) -> float:
    """Jobs of a model that workers have run, of all its versions."""
    return REGISTRY.get_sample_value("tether_batch_rows_sum", {"model": name}) or 0.0


def counted(what: str, name: str) -> float:
    return REGISTRY.get_sample_value(f"tether_response_cache_{what}_total", {"model": name}) or 0.0


def test_the_same_request_is_answered_again_without_a_run_in_whatever_form(served: Served, http: httpx.Client) -> None:
    name = "kept-again"
    cached(served, name)
    before = runs(name)
    assert ask(http, name, 1.0) == ("miss", 2.0)
    assert ask(http, name, 1.0) == ("hit", 2.0)
    array = np.full((1, 4), 1.0, np.float32)
    content, length = oip.build_infer_request({"x": array}, id="mine")
    head = {"inference-header-content-length": str(length)}
    answer = http.post(f"/v2/models/{name}/infer", content=content, headers=head)
    assert answer.headers["x-tether-cache"] == "hit"
    told = oip.parse_infer_response(answer.content, int(answer.headers["inference-header-content-length"]))
    assert (told.id, told.version, told.outputs["y"].tolist()) == ("mine", "1", [[2.0] * 4])
    simple = http.post("/v1/inference", json={"modelId": name, "inputData": [[1.0] * 4]})
    assert (simple.headers["x-tether-cache"], simple.json()["output"]["y"]) == ("hit", [[2.0] * 4])
    assert runs(name) == before + 1
    assert ask(http, name, 1.5) == ("miss", 2.5)
    named = http.post(f"/v2/models/{name}/infer", json=body(1.0, outputs=[{"name": "y"}]))
    assert named.headers["x-tether-cache"] == "miss"
    assert (counted("hits", name), counted("misses", name)) == (3.0, 3.0)


def test_without_a_time_to_keep_them_nothing_is_kept_and_nothing_is_said(served: Served, http: httpx.Client) -> None:
    name = "unkept"
    served.push(name, models.add())
    assert [ask(http, name), ask(http, name)] == [("", 1.0)] * 2
    assert runs(name) == 2


def test_no_tenant_gets_what_another_one_asked(served: Served, http: httpx.Client) -> None:
    name = "kept-apart"
    cached(served, name)
    other = served.new_key("infer", tenant="other")
    assert [ask(http, name)[0], ask(http, name)[0]] == ["miss", "hit"]
    assert [ask(http, name, headers={"x-api-key": other})[0] for _ in range(2)] == ["miss", "hit"]
    same = served.new_key("infer")
    assert ask(http, name, headers={"x-api-key": same})[0] == "hit"


def test_what_a_sealed_tenant_was_answered_is_not_kept(served: Served, http: httpx.Client) -> None:
    name, tenant = "kept-sealed", "discreet"
    cached(served, name)
    key = {"x-api-key": served.new_key("infer", tenant=tenant)}
    assert [ask(http, name, headers=key)[0] for _ in range(2)] == ["miss", "hit"]
    gateway = served.services.gateway
    served.run(gateway.tenants.store(Tenant(tenant, sealed=True)))
    until(lambda: gateway.tenant_encryption.keyring.newest(tenant) is not None, "the tenant has a key")
    assert tenant not in gateway.features.kept.cache._shelves
    assert [ask(http, name, headers=key) for _ in range(2)] == [("", 1.0)] * 2
    assert tenant not in gateway.features.kept.cache._shelves


def test_an_alias_that_moves_takes_no_old_answer_along(served: Served, http: httpx.Client) -> None:
    name = "kept-moving"
    cached(served, name)
    assert served.push(name, models.add(2.0)) == 2
    with Client(served.url, served.key) as sdk:
        sdk.promote(name, 1)
        until(lambda: ask(http, name, version="production")[1] == 1.0, "version 1 answers")
        assert ask(http, name, version="production") == ("hit", 1.0)
        sdk.promote(name, 2)
        until(lambda: ask(http, name, version="production")[1] == 2.0, "version 2 answers")
        sdk.rollback(name)
        until(lambda: ask(http, name, version="production")[1] == 1.0, "version 1 answers again")
        assert ask(http, name, version="production") == ("hit", 1.0)


def test_answers_go_when_their_time_is_over(served: Served, http: httpx.Client) -> None:
    name = "kept-briefly"
    cached(served, name, ttl_s=1.0)
    assert ask(http, name)[0] == "miss"
    until(lambda: ask(http, name)[0] == "hit", "an answer is kept")
    until(lambda: ask(http, name)[0] == "miss", "its time is over")


def test_answers_go_when_the_configuration_changes_or_a_version_goes(served: Served, http: httpx.Client) -> None:
    name = "kept-until"
    cached(served, name)
    kept = served.services.gateway.features.kept.cache
    assert [ask(http, name)[0], ask(http, name)[0]] == ["miss", "hit"]
    served.run(configure(served.services, ModelConfig(name, revision=2, cache_ttl_s=300.0)))
    assert [ask(http, name)[0], ask(http, name)[0]] == ["miss", "hit"]
    assert served.push(name, models.add(5.0)) == 2
    assert ask(http, name, version="1")[0] == "hit"
    assert http.delete(f"/v1/models/{name}/versions/1").status_code == 200
    until(lambda: http.get(f"/v2/models/{name}/versions/1").status_code == 404, "the version is gone")
    assert not any(entry.model == name for shelf in kept._shelves.values() for entry in shelf.values())
    served.run(unconfigure(served.services, name))
    assert [ask(http, name) for _ in range(2)] == [("", 5.0)] * 2


def test_errors_are_not_kept(served: Served, http: httpx.Client) -> None:
    name = "kept-failing"
    cached(served, name, models.gather())
    before = runs(name)
    tensor = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [99]}
    for _ in range(2):
        answer = http.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
        assert answer.json()["code"] == "inference_failed"
        assert "x-tether-cache" not in answer.headers
    assert runs(name) == before + 2
    assert (counted("hits", name), counted("misses", name)) == (0.0, 2.0)


def test_requests_that_are_the_same_at_the_same_time_are_one_run(served: Served) -> None:
    name = "kept-together"
    cached(served, name)
    before = runs(name)
    with served.client() as http, ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda _: ask(http, name, 3.0), range(64)))
    assert {value for _, value in told} == {4.0}
    assert [said for said, _ in told].count("miss") == 1
    assert runs(name) == before + 1


def test_durable_jobs_are_always_run(served: Served, http: httpx.Client) -> None:
    name = "kept-jobs"
    cached(served, name)
    assert [ask(http, name)[0], ask(http, name)[0]] == ["miss", "hit"]
    before = runs(name)
    for _ in range(2):
        job = http.post("/v1/jobs", json={"model": name, **body()}).json()
        assert http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()["state"] == "succeeded"
    assert runs(name) == before + 2


def test_access_and_limits_are_decided_before_anything_is_looked_up(served: Served, http: httpx.Client) -> None:
    name = "kept-guarded"
    cached(served, name)
    assert [ask(http, name)[0], ask(http, name)[0]] == ["miss", "hit"]
    text = api_key.new_key_text()
    record = api_key.stored_key(text, tenant="acme", scopes=("infer",), name="slow", created_at=time.time())
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(record, rate=0.001, burst=3)))
    told = [http.post(f"/v2/models/{name}/infer", json=body(), headers={"x-api-key": text}) for _ in range(5)]
    assert [answer.status_code for answer in told] == [200, 200, 200, 429, 429]
    reader = served.new_key("models:read")
    assert http.post(f"/v2/models/{name}/infer", json=body(), headers={"x-api-key": reader}).status_code == 403
    assert http.post(f"/v2/models/{name}/infer", json=body(), headers={"x-api-key": "tk_no"}).status_code == 401
    other = api_key.stored_key(
        other_text := api_key.new_key_text(), tenant="acme", scopes=("infer",), name="n", created_at=0
    )
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(other, models=("nothing-*",))))
    assert http.post(f"/v2/models/{name}/infer", json=body(), headers={"x-api-key": other_text}).status_code == 404


def test_an_answer_that_was_kept_is_audited_as_a_request_that_was_no_job(served: Served, http: httpx.Client) -> None:
    name = "kept-audited"
    cached(served, name)
    for number in range(3):
        ask(http, name, headers={"x-request-id": f"cache-{number}"})

    def entries() -> list[dict[str, Any]]:
        answer = http.get("/v1/audit", params={"kind": "inference", "model": name, "limit": 100})
        assert answer.status_code == 200, answer.text
        return sorted(answer.json()["entries"], key=lambda entry: str(entry["request_id"]))

    until(lambda: len(entries()) == 3, "all three are in the log")
    told = [(entry["request_id"], entry["outcome"], bool(entry.get("job"))) for entry in entries()]
    assert told == [("cache-0", "ok", True), ("cache-1", "ok", False), ("cache-2", "ok", False)]
    assert {(entry["bytes_in"], entry["bytes_out"]) for entry in entries()} == {(16, 16)}
    assert REGISTRY.get_sample_value("tether_infer_seconds_count", {"model": name}) == 3.0
