"""Models of the same name in several tenants: each is answered by its own, and none reaches another's by any spelling."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from support.http.served import Served, until
from support.http.tenant_http import INPUT, Tenant, pushed
from support.models import models
from support.platform.platforms import tether

from tether import Client
from tether.errors import ModelNotFound


@pytest.fixture
def three(one: Tenant, two: Tenant, default: Tenant, name: str) -> dict[str, Tenant]:
    """Tenants with a model of one name each, by what their models add."""
    found = {"1": one, "10": two, "100": default}
    for bias, owner in found.items():
        pushed(owner, name, float(bias))
    return found


def first(answer: httpx.Response) -> tuple[str, float]:
    """The model and the first number that an answer tells, whatever route it is of."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if "output" in body:
        return body["modelId"], body["output"]["y"][0][0]
    return body["model_name"], body["outputs"][0]["data"][0]


def value(number: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [number] * 4}]}


def counted(metric: str, model: str) -> float:
    return REGISTRY.get_sample_value(metric, {"model": model}) or 0.0


def test_tenants_with_the_same_name_get_their_own_answers_at_the_same_time(three: dict[str, Tenant], name: str) -> None:
    def infer(case: tuple[str, int]) -> None:
        bias, number = case
        wanted = (name, number + float(bias))
        asked = three[bias].http
        assert first(asked.post(f"/v2/models/{name}/infer", json=value(number))) == wanted
        assert first(asked.post(f"/v2/models/{name}/versions/1/infer", json=value(number))) == wanted
        simple = {"modelId": name, "inputData": [[number] * 4]}
        assert first(asked.post("/v1/inference", json=simple)) == wanted

    platform = shown_names(three, name)
    before = [counted("tether_infer_seconds_count", model) for model in platform]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(infer, [(bias, number) for number in range(20) for bias in three]))
    after = [counted("tether_infer_seconds_count", model) for model in platform]
    assert [more - less for more, less in zip(after, before, strict=True)] == [60.0] * 3, "each counts for itself"


def shown_names(three: dict[str, Tenant], name: str) -> list[str]:
    """What the platform calls the models."""
    return [name if owner.name == "default" else f"{owner.name}/{name}" for owner in three.values()]


def test_cached_and_joined_answers_are_the_tenants_own(three: dict[str, Tenant], name: str) -> None:
    for owner in three.values():
        changed = owner.http.patch(f"/v1/models/{name}/config", json={"cache_ttl_s": 60, "max_batch_size": 8})
        assert (changed.status_code, changed.json()["model"]) == (200, name), changed.text

    def infer(case: tuple[str, int]) -> tuple[str, str]:
        bias, _ = case
        answer = three[bias].http.post(f"/v2/models/{name}/infer", json=value(5.0))
        assert first(answer) == (name, 5.0 + float(bias))
        return bias, answer.headers["x-tether-cache"]

    with ThreadPoolExecutor(9) as pool:
        told = list(pool.map(infer, [(bias, number) for number in range(10) for bias in three]))
    for bias in three:
        assert sum(told.count((bias, what)) for what in ("miss", "hit", "joined")) == 10
        assert told.count((bias, "miss")) == 1


def test_jobs_and_their_keys_are_the_tenants_own(three: dict[str, Tenant], name: str) -> None:
    body = {"model": name, **value(7.0)}
    ids = {}
    for bias, owner in three.items():
        made = [owner.http.post("/v1/jobs", json=body, headers={"idempotency-key": "k"}) for _ in range(2)]
        assert [answer.status_code for answer in made] == [202, 202], made[0].text
        assert {answer.json()["model"] for answer in made} == {name}
        (ids[bias],) = {answer.json()["id"] for answer in made}
    assert len(set(ids.values())) == 3
    for bias, owner in three.items():
        job = owner.http.get(f"/v1/jobs/{ids[bias]}", params={"wait": 20}).json()
        assert (job["model"], job["result"]["model_name"]) == (name, name)
        assert job["result"]["outputs"][0]["data"][0] == 7.0 + float(bias)
        for query in ({"model": name}, {}):
            listed = owner.http.get("/v1/jobs", params=query).json()["jobs"]
            assert [(job["id"], job["model"]) for job in listed if job["model"].endswith(name)] == [(ids[bias], name)]
        for other in set(ids.values()) - {ids[bias]}:
            assert owner.http.get(f"/v1/jobs/{other}").status_code == 404


def test_aliases_shadows_configuration_and_listing_are_the_tenants_own(
    three: dict[str, Tenant], one: Tenant, two: Tenant, name: str
) -> None:
    pushed(one, name, 2.0)
    alias = one.http.put(f"/v1/models/{name}/aliases/production", json={"version": 1})
    assert (alias.status_code, alias.json()["model"]) == (200, name), alias.text
    config = one.http.patch(
        f"/v1/models/{name}/config", json={"shadows": [{"version": 2, "percent": 100, "alias": "production"}]}
    )
    assert config.status_code == 200, config.text
    until(lambda: one.http.get(f"/v2/models/{name}/versions/2/ready").status_code == 200, "version 2 is held")
    infer = f"/v2/models/{name}/versions/production/infer"
    assert first(one.http.post(infer, json=value(0.0))) == (name, 1.0)

    def different() -> int:
        told = one.http.get(f"/v1/models/{name}/shadows").json()
        assert told["model"] == name
        return int(told["shadows"][0]["different"])

    until(lambda: different() == 1, "the shadow's answer is compared")
    assert two.http.post(infer, json=value(0.0)).status_code == 404
    assert two.http.get(f"/v1/models/{name}/shadows").json()["shadows"] == []
    for owner, versions in ((one, [1, 2]), (two, [1])):
        listed = {entry["name"]: entry for entry in owner.http.get("/v1/models").json()["models"]}
        assert (listed[name]["versions"], listed[name]["right"]) == (versions, "own")
        assert (listed[f"default/{name}"]["versions"], listed[f"default/{name}"]["right"]) == ([1], "use")
        assert {entry for entry in listed if entry.endswith(f"/{name}")} == {f"default/{name}"}
        assert owner.listed() == {entry: found["right"] for entry, found in listed.items()}
        meta = owner.http.get(f"/v2/models/{name}").json()
        assert (meta["name"], meta["versions"]) == (name, [str(version) for version in versions])
        triton = owner.http.get(f"/v2/models/{name}/config").json()
        assert (triton["name"], triton["instance_group"][0]["name"]) == (name, f"{name}_0")
        loaded = owner.http.post(
            f"/v2/repository/models/{name}/load", json={"parameters": {"config": json.dumps(triton)}}
        )
        assert (loaded.status_code, loaded.json()["name"]) == (200, name), loaded.text
    assert two.http.get(f"/v1/models/{name}/config").json()["shadows"] == []


def test_the_default_tenants_model_is_reached_with_its_name_before_it(
    three: dict[str, Tenant], one: Tenant, name: str
) -> None:
    for path in (f"default%2F{name}", f"default/{name}"):
        assert first(one.http.post(f"/v2/models/{path}/infer", json=value(1.0))) == (f"default/{name}", 101.0)
        assert first(one.http.post(f"/v2/models/{path}/versions/latest/infer", json=value(1.0)))[1] == 101.0
        assert one.http.get(f"/v2/models/{path}/ready").json()["name"] == f"default/{name}"
        assert one.http.get(f"/v1/models/{path}").json()["name"] == f"default/{name}"
    job = one.http.post("/v1/jobs", json={"model": f"default/{name}", **INPUT}).json()
    assert job["model"] == f"default/{name}"
    assert first(three["100"].http.post(f"/v2/models/default%2F{name}/infer", json=value(1.0))) == (name, 101.0)


def test_before_a_tenant_has_a_model_of_the_name_it_means_the_default_tenants(
    default: Tenant, one: Tenant, name: str
) -> None:
    pushed(default, name, 100.0)
    assert first(one.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 101.0)
    pushed(one, name, 1.0)
    assert first(one.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 2.0)
    assert first(default.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 101.0)
    assert list(default.http.get(f"/v1/models/{name}").json()["aliases"].values()) == [1]


def test_a_grant_reaches_into_another_namespace(one: Tenant, two: Tenant, name: str) -> None:
    pushed(one, name, 1.0)
    pushed(two, name, 10.0)
    theirs = f"{one.name}/{name}"
    assert one.grant(name, two.name, "use").json()["model"] == name
    for path in (one.seen(name), theirs):
        assert first(two.http.post(f"/v2/models/{path}/infer", json=value(1.0))) == (theirs, 2.0)
    assert first(two.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 11.0)
    assert two.listed()[theirs] == "use"
    job = two.http.post("/v1/jobs", json={"model": theirs, **value(1.0)}).json()
    ended = two.http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()
    assert (ended["model"], ended["result"]["outputs"][0]["data"][0]) == (theirs, 2.0)
    assert two.http.get("/v1/jobs", params={"model": theirs}).json()["jobs"][0]["id"] == job["id"]
    assert two.http.get("/v1/jobs", params={"model": name}).json()["jobs"] == []
    assert two.push(one.seen(name), 3.0).status_code == 403
    one.grant(name, two.name, "write")
    assert two.push(one.seen(name), 3.0).json()["name"] == theirs
    assert list(one.http.get(f"/v1/models/{name}").json()["aliases"].values()) == [2]
    assert two.http.put(f"/v1/models/{theirs}/aliases/x", json={"version": 1}).json()["model"] == theirs
    one.http.delete(f"/v1/models/{name}/grants/{two.name}")
    assert two.infer(one.seen(name)) == 404
    assert theirs not in two.listed()
    assert two.http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_model_from_before_keeps_its_plain_name(
    served: Served, default: Tenant, one: Tenant, two: Tenant, name: str
) -> None:
    """It is another tenant's with a plain name, as what it pushed before there were namespaces."""
    pushed(default, name, 100.0)
    with served.client() as admin:
        admin.delete(f"/v1/models/{name}/grants/*")
        assert admin.put(f"/v1/models/{name}/owner", json={"tenant": one.name}).status_code == 200
    assert one.listed()[name] == "own"
    assert first(one.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 101.0)
    assert one.push(name, 200.0).json()["version"] == 2
    assert f"{one.name}/{name}" not in one.listed()
    one.grant(name, two.name, "use")
    assert two.infer(name) == 200
    pushed(two, name, 10.0)
    assert first(two.http.post(f"/v2/models/{name}/infer", json=value(1.0))) == (name, 11.0)
    until(lambda: first(two.http.post(f"/v2/models/default%2F{name}/infer", json=value(1.0)))[1] == 201.0, "version 2")
    assert one.infer(two.seen(name)) == 404
    assert (default.infer(name), default.push(name, 3.0).status_code) == (404, 409)


def test_administrators_say_which_tenants_model_they_mean(served: Served, three: dict[str, Tenant], name: str) -> None:
    platform = shown_names(three, name)
    with served.client() as admin:
        listed = {entry["name"] for entry in admin.get("/v1/models").json()["models"]}
        assert set(platform) <= listed
        for written, bias in zip(platform, three, strict=True):
            path = written.replace("/", "%2F")
            assert first(admin.post(f"/v2/models/{path}/infer", json=value(1.0))) == (written, 1.0 + float(bias))
            found = admin.get("/v1/audit", params={"model": written, "kind": "model"}).json()["entries"]
            assert {entry["model"] for entry in found} == {written}

        def held() -> set[str]:
            return {ref["model"] for worker in admin.get("/v1/workers").json()["workers"] for ref in worker["ready"]}

        until(lambda: set(platform) <= held(), "the worker's heartbeat names them")
        fresh = f"new-{name}"
        owner = three["1"]
        made = admin.post(f"/v1/models/{owner.seen(fresh)}/versions", content=models.add(5.0))
        assert (made.status_code, made.json()["name"]) == (201, f"{owner.name}/{fresh}"), made.text
        assert owner.listed()[fresh] == "own"
        assert three["10"].infer(owner.seen(fresh)) == 404


def test_errors_name_a_model_as_its_tenant_writes_it(one: Tenant, name: str) -> None:
    pushed(one, name)
    wrong = {"inputs": [{"name": "z", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    answers = [
        one.http.post(f"/v2/models/{name}/infer", json=wrong),
        one.http.post("/v1/jobs", json={"model": name, **wrong}),
        one.http.get(f"/v2/models/{name}/versions/9"),
        one.http.put(f"/v1/models/{name}/aliases/x", json={"version": 9, "force": True}),
        one.http.post(f"/v1/models/{name}/rekey"),
    ]
    for answer in answers:
        assert answer.status_code in (400, 404), answer.text
        assert f"model '{name}'" in answer.json()["error"]
        assert one.name not in answer.text


def test_the_sdk_and_the_command_line_take_a_tenant_before_the_name(
    served: Served, one: Tenant, two: Tenant, name: str, tmp_path: Path
) -> None:
    pushed(one, name, 1.0)
    theirs = f"{one.name}/{name}"
    with Client(served.url, two.key) as client:
        with pytest.raises(ModelNotFound):
            client.infer(theirs, {"x": [[1.0] * 4]})
        one.grant(name, two.name, "write")
        assert client.infer(theirs, {"x": [[1.0] * 4]})["y"].tolist() == [[2.0] * 4]
        job = client.submit(theirs, {"x": [[1.0] * 4]})
        assert job.result(timeout=20)["y"].tolist() == [[2.0] * 4]
        assert client.model(theirs)["name"] == theirs
        assert client.jobs(model=theirs).jobs[0].id == job.id
    env = {"TETHER_URL": served.url, "TETHER_API_KEY": two.key}

    def said(*words: str) -> str:
        done = tether(served.home, *words, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = tmp_path / "model.onnx"
    file.write_bytes(models.add(2.0))
    assert said("model", "push", theirs, str(file)).split() == [theirs, "2"]
    assert said("model", "push", name, str(file)).split() == [name, "1"]
    assert said("model", "promote", theirs, "1", "--force").split()[0] == theirs
    assert theirs in said("model", "list")
    said("model", "pull", theirs, str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
