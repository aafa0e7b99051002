"""Load, unload, index and configuration with an unmodified ``tritonclient[http]``, and what a version policy refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from google.protobuf import json_format
from support.http.oip_cases import given, refused
from support.http.served import Served, until
from support.models import models
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from tether import Client
from tether.errors import ModelUnloaded
from tether_cli.main import application

X = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}


@pytest.fixture
def sdk(served: Served) -> Iterator[Client]:
    with Client(served.url, served.key, timeout=60) as client:
        yield client


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.url.removeprefix("http://"), network_timeout=60) as made:
        yield made


@pytest.fixture
def headers(served: Served) -> dict[str, str]:
    return dict(served.headers)


def states(client: triton.InferenceServerClient, headers: dict[str, str], name: str) -> dict[str, tuple[str, str]]:
    told = client.get_model_repository_index(headers=headers)
    return {entry["version"]: (entry["state"], entry["reason"]) for entry in told if entry["name"] == name}


def held(served: Served, name: str) -> set[int]:
    """Versions that workers hold."""
    return {ref.version for worker in served.services.workers for ref in worker.holder.ready() if ref.model == name}


def test_a_model_is_unloaded_and_loaded_again(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], http: httpx.Client
) -> None:
    assert "model_repository" in client.get_server_metadata()["extensions"]
    served.push("resting", models.add())
    row = given("x", np.zeros((1, 4), np.float32))
    client.infer("resting", [row], headers=headers)
    client.unload_model("resting", headers=headers)
    refused(lambda: client.infer("resting", [row], headers=headers), "unloaded", "tether model load", status="404")
    assert not client.is_model_ready("resting", headers=headers)
    until(lambda: states(client, headers, "resting") == {"1": ("UNAVAILABLE", "unloaded")}, "all workers let go of it")
    assert held(served, "resting") == set()
    assert http.get("/v1/models/resting").json()["loaded"] is False
    waiting = http.post("/v1/jobs", json={"model": "resting", "inputs": [X]})
    assert waiting.status_code == 202, waiting.text
    client.load_model("resting", headers=headers)
    assert client.is_model_ready("resting", headers=headers)
    client.infer("resting", [row], headers=headers)
    done = http.get(f"/v1/jobs/{waiting.json()['id']}", params={"wait": 30}).json()
    assert (done["state"], states(client, headers, "resting")["1"]) == ("succeeded", ("READY", ""))


def test_loading_what_is_loaded_and_what_is_not_there(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], http: httpx.Client
) -> None:
    served.push("awake", models.add())
    client.load_model("awake", headers=headers)
    assert http.get("/v1/models/awake/config").json()["revision"] == 0
    refused(lambda: client.load_model("nowhere", headers=headers), "no model 'nowhere'", status="404")
    refused(lambda: client.unload_model("nowhere", headers=headers), "no model 'nowhere'", status="404")
    answer = http.post("/v2/repository/models/awake/load", json={"parameters": {"file:1/model.onnx": "AAAA"}})
    assert (answer.status_code, "push them" in answer.json()["error"]) == (400, True)
    answer = http.post("/v2/repository/models/awake/load", json={"parameters": {"config": "{"}})
    assert answer.status_code == 400, answer.text


TUNED = {
    "preferred_batch_sizes": [2, 4],
    "max_batch_size": 8,
    "max_delay_ms": 1.5,
    "instances": 2,
    "kind": "cpu",
    "queue": {"max_size": 9, "timeout_ms": 250, "timeout_action": "delay", "allow_timeout_override": False},
    "versions": {"latest": 2},
    "cache_ttl_s": 3,
    "warmup": [{"rows": 2, "count": 3, "random": True}],
}


def test_the_configuration_is_one_that_triton_knows(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], sdk: Client
) -> None:
    """Parsed by the protocol buffers of Triton itself: no name or type that these do not have."""
    served.push("formed", models.add())
    sdk.configure("formed", TUNED)
    told = client.get_model_config("formed", headers=headers)
    parsed = json_format.Parse(json.dumps(told), model_config_pb2.ModelConfig())
    assert (parsed.name, parsed.max_batch_size, parsed.version_policy.latest.num_versions) == ("formed", 8, 2)
    batching = parsed.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([2, 4], 1500)
    policy = batching.default_queue_policy
    assert (policy.timeout_action, policy.default_timeout_microseconds) == (policy.DELAY, 250_000)
    assert (policy.allow_timeout_override, policy.max_queue_size) == (False, 9)
    (group,) = parsed.instance_group
    assert (group.count, group.kind, parsed.response_cache.enable) == (2, group.KIND_CPU, True)
    (warmup,) = parsed.model_warmup
    assert (warmup.batch_size, warmup.count) == (2, 3)
    assert (list(warmup.inputs["x"].dims), warmup.inputs["x"].random_data) == ([4], True)
    assert client.get_model_config("formed", "1", headers=headers) == told


def test_a_configuration_that_was_shown_can_be_given_with_a_load(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], sdk: Client
) -> None:
    served.push("given", models.add())
    before = sdk.configure("given", {**TUNED, "loaded": False})
    shown = client.get_model_config("given", headers=headers)
    client.load_model("given", headers=headers, config=json.dumps(shown))
    after = sdk.config("given")
    kept = [name for name in before if name not in ("revision", "changed_at", "loaded", "warmup")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["warmup"] == [{"rows": 2, "count": 3, "shapes": {"x": [4]}, "random": True}]
    shown["dynamic_batching"]["default_queue_policy"]["max_queue_size"] = 77
    shown["version_policy"] = {"specific": {"versions": [1]}}
    client.load_model("given", headers=headers, config=json.dumps(shown))
    assert (sdk.config("given")["queue"]["max_size"], sdk.config("given")["versions"]["specific"]) == (77, [1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sequence_batching": {}}, "sequence_batching"),
        ({"instance_group": [{"kind": "KIND_TPU"}]}, "KIND_CPU"),
        ({"instance_group": [{}, {}]}, "several groups"),
        ({"response_cache": {"enable": True}}, "cache_ttl_s"),
        ({"version_policy": {"specific": {"versions": [9]}}}, "no version 9"),
        ({"max_batch_size": 65000}, "only lower"),
        ({"name": "another"}, "the model is 'refusing'"),
        ("{", "parameters.config is invalid"),
        ({"dynamic_batching": {"default_queue_policy": {"timeout_action": "EXPLODE"}}}, "timeout_action"),
    ],
)
def test_what_cannot_be_given_with_a_load_is_refused(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], wrong: Any, words: str
) -> None:
    served.push("refusing", models.add())
    text = wrong if isinstance(wrong, str) else json.dumps(wrong)
    refused(lambda: client.load_model("refusing", headers=headers, config=text), words, status="400")


def test_versions_that_the_policy_does_not_serve_are_not_answered(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], sdk: Client, http: httpx.Client
) -> None:
    for number in (1, 2, 3):
        served.push("policed", models.add(float(number)))
    sdk.promote("policed", 1)
    sdk.configure("policed", {"versions": {"specific": [2]}})
    row = given("x", np.zeros((1, 4), np.float32))

    def asked(version: str) -> float:
        return float(client.infer("policed", [row], version, headers=headers).as_numpy("y")[0, 0])

    assert (asked("2"), asked(""), asked("latest"), asked("production")) == (2.0, 2.0, 2.0, 1.0)
    refused(lambda: asked("3"), "version 3", "not served", "serves 1, 2", status="404")
    refused(lambda: client.get_model_metadata("policed", "3", headers=headers), "not served", status="404")
    job = http.post("/v1/jobs", json={"model": "policed", "version": 3, "inputs": [X]})
    assert (job.status_code, job.json()["code"]) == (404, "model_not_found")
    why = "the version policy does not serve it"
    until(lambda: states(client, headers, "policed")["3"] == ("UNAVAILABLE", why), "workers let go of version 3")
    assert held(served, "policed") == {1, 2}
    assert [version["served"] for version in sdk.model("policed")["versions"]] == [True, True, False]
    sdk.pull("policed", served.home.root / "pulled", version=3)
    sdk.promote("policed", 3, alias="tried", force=True)
    until(lambda: client.is_model_ready("policed", "tried", headers=headers), "what an alias stands for is served")
    assert asked("tried") == 3.0


def test_under_a_policy_of_the_latest_a_push_takes_over_when_it_is_held(
    served: Served, client: triton.InferenceServerClient, headers: dict[str, str], sdk: Client
) -> None:
    served.push("rolling", models.add(1.0))
    sdk.configure("rolling", {"versions": {"latest": 1}})
    row = given("x", np.zeros((1, 4), np.float32))
    served.push("rolling", models.add(2.0))
    assert float(client.infer("rolling", [row], headers=headers).as_numpy("y")[0, 0]) == 2.0
    refused(lambda: client.infer("rolling", [row], "1", headers=headers), "not served", status="404")
    sdk.configure("rolling", {"versions": {"latest": 2}})
    until(lambda: client.is_model_ready("rolling", "1", headers=headers), "version 1 is served again")


def test_the_commands_load_and_unload(served: Served, sdk: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    served.push("switched", models.add())
    monkeypatch.setenv("TETHER_URL", served.url)
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    runner, app = CliRunner(), application()
    done = runner.invoke(app, ["model", "unload", "switched"], catch_exceptions=False)
    assert (done.exit_code, done.stdout.split()[0]) == (0, "switched")
    with pytest.raises(ModelUnloaded):
        sdk.infer("switched", {"x": np.zeros((1, 4), np.float32)})
    assert sdk.reset_config("switched")["loaded"] is False
    done = runner.invoke(app, ["model", "load", "switched", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout) == {"name": "switched", "version": "1", "state": "READY"}
    assert sdk.infer("switched", {"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 4)
