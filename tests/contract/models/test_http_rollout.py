"""A push waits until a worker answers for its version, and says why when none is going to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http.served import Served, served, until
from support.models import bundles, models
from typer.testing import CliRunner, Result

from tether import AsyncClient, Client
from tether.broker.embedded_server import Binary
from tether.client import rollout as client_rollout
from tether.errors import Forbidden, ModelNotFound, ModelNotReady
from tether_cli.main import application

GUARD = "        assert os.environ['OMP_NUM_THREADS'] != '3', 'too many threads'\n"
"""Loads at the inspection and on workers, but for those with three threads."""


def written(folder: Path, bias: float = 1.0) -> str:
    path = folder / "m.onnx"
    path.write_bytes(models.add(bias))
    return str(path)


def guarded(folder: Path) -> str:
    code = bundles.CODE.replace("        self.bias", f"{GUARD}        self.bias", 1)
    return str(bundles.write(folder / "guarded", code=code))


def pushed(platform: Served, *given: str, key: str = "") -> Result:
    settings = {"TETHER_URL": platform.url, "TETHER_API_KEY": key or platform.key}
    return CliRunner().invoke(application(), ["model", "push", *given], env=settings)


@pytest.fixture
def bare(nats_binary: Binary) -> Iterator[Served]:
    """A platform that has no workers yet."""
    with served(nats_binary, workers=0) as running:
        yield running


def test_a_push_of_the_command_line_ends_when_a_worker_answers(served: Served, tmp_path: Path) -> None:
    told = pushed(served, "rolled-out", written(tmp_path), "--json")
    assert told.exit_code == 0, told.output
    rollout = json.loads(told.stdout)["rollout"]
    assert {**rollout, "reason": ""} == {
        "name": "rolled-out",
        "version": 1,
        "state": "ready",
        "workers": 1,
        "ready": 1,
        "failed": 0,
        "reason": "",
    }
    with served.client() as http:
        assert http.get("/v2/models/rolled-out/versions/1/ready").status_code == 200
    assert "ready: 1 of 1 worker ready" in pushed(served, "rolled-out", written(tmp_path)).stderr


def test_a_key_that_may_push_may_wait_and_one_that_may_only_infer_may_not(served: Served, tmp_path: Path) -> None:
    told = pushed(served, "waited-by-writer", written(tmp_path), key=served.new_key("models:write"))
    assert told.exit_code == 0, told.output
    with Client(served.url, served.new_key("infer", "models:read")) as reader, pytest.raises(Forbidden):
        reader.wait_ready("waited-by-writer", 1)


async def test_both_clients_wait_for_a_version(served: Served, sdk: Client, tmp_path: Path) -> None:
    path = written(tmp_path)
    assert pushed(served, "waited-for", path, "--no-wait", "--json").exit_code == 0
    said: list[str] = []
    assert sdk.wait_ready("waited-for", 1, waiting=said.append)["state"] == "ready"
    assert said[-1] == ""
    async with AsyncClient(served.url, served.key) as client:
        assert (await client.wait_ready("waited-for", 1))["ready"] == 1
        with pytest.raises(ModelNotFound):
            await client.wait_ready("waited-for", 2)


def test_a_version_that_no_worker_can_load_is_told_with_the_reason_and_status_1(bare: Served, tmp_path: Path) -> None:
    for name in ("worker-1", "worker-2"):
        bare.run(bare.services.start_worker(name, instance_threads=3))
    told = pushed(bare, "unloadable", guarded(tmp_path))
    assert told.stdout.splitlines()[0] == "unloadable 1"
    assert isinstance(told.exception, ModelNotReady)
    message = str(told.exception)
    assert "version 1 of model 'unloadable' is stored, but not ready: 2 of 2 workers could not load it" in message
    assert "too many threads" in message
    bare.run(bare.services.start_worker("worker-3"))
    with Client(bare.url, bare.key) as client:
        assert client.wait_ready("unloadable", 1)["ready"] == 1


def test_a_push_with_one_replica_waits_for_the_worker_that_can_load_it(bare: Served, tmp_path: Path) -> None:
    bare.run(bare.services.start_worker("worker-1", instance_threads=3))
    bare.run(bare.services.start_worker("worker-2"))
    config = tmp_path / "config.json"
    config.write_text('{"replicas_max": 1}')
    told = pushed(bare, "picky", guarded(tmp_path), "--config", str(config), "--json")
    assert told.exit_code == 0, told.output
    rollout = json.loads(told.stdout)["rollout"]
    assert (rollout["state"], rollout["workers"], rollout["ready"]) == ("ready", 1, 1)


def test_without_a_worker_that_may_hold_it_a_push_says_so(
    bare: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(client_rollout.SETTLED_S, "no_workers", 0.3)
    told = pushed(bare, "early", written(tmp_path))
    assert told.exit_code == 0, told.output
    assert "stored, not loaded yet: no worker hosts it: none is running" in told.stderr
    with Client(bare.url, bare.key) as client, pytest.raises(ModelNotReady, match="tether worker"):
        client.wait_ready("early", 1)
    bare.run(bare.services.start_worker("worker-1"))
    config = tmp_path / "config.json"
    config.write_text('{"labels": {"gpu": "yes"}}')
    told = pushed(bare, "labelled", written(tmp_path), "--config", str(config))
    assert isinstance(told.exception, ModelNotReady)
    assert "no worker has the labels gpu=yes" in str(told.exception)


def test_a_version_that_is_not_to_be_loaded_is_not_waited_for(served: Served, sdk: Client, tmp_path: Path) -> None:
    path = written(tmp_path)
    assert pushed(served, "kept-out", path).exit_code == 0
    sdk.configure("kept-out", {"versions": {"specific": [1]}})
    told = pushed(served, "kept-out", written(tmp_path, 2.0))
    assert (told.exit_code, told.stderr.splitlines()[-1]) == (
        0,
        "stored, not loaded yet: the model's version policy does not serve it",
    )
    sdk.unload("kept-out")
    with served.client() as http:
        until(lambda: http.get("/v2/models/kept-out/ready").status_code == 400, "it is unloaded")
    told = pushed(served, "kept-out", written(tmp_path, 3.0))
    assert (told.exit_code, told.stderr.splitlines()[-1]) == (0, "stored, not loaded yet: the model is unloaded")
