"""How models are served, over HTTP, the SDK and the command line: shown, changed, put back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.http.served import Served, until
from support.models import models
from typer.testing import CliRunner

from tether import Client
from tether.audit import Kind
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.errors import Conflict, InvalidRequest, ModelNotFound
from tether.model.config import ModelConfig, QueuePolicy
from tether.wire import codec
from tether.wire.subjects import token
from tether_cli.main import application


def stored(served: Served, name: str) -> ModelConfig:
    """What the bucket holds, as any other service reads it."""

    async def read() -> ModelConfig:
        async with connect(served.services.settings, served.home, "modelstore") as bus:
            body = await SignedBucket(bus, "configs", MessageType.CONFIG).require(token(name))
            assert body is not None
            return codec.decode(body, ModelConfig)

    return served.run(read())


def test_a_configuration_is_shown_changed_and_put_back(served: Served, http: httpx.Client) -> None:
    served.push("tuned", models.add())
    path = "/v1/models/tuned/config"
    first = http.get(path).json()
    assert (first["revision"], first["instances"], first["queue"]["max_size"]) == (0, 1, 0)
    assert first["load_balancing"] == "least_connections"
    changed = http.patch(path, json={"queue": {"max_size": 7}, "instances": 2, "load_balancing": "capacity"})
    assert changed.status_code == 200, changed.text
    told = changed.json()
    assert (told["revision"], told["queue"]["max_size"], told["queue"]["timeout_action"]) == (1, 7, "reject")
    assert told["load_balancing"] == "capacity"
    assert told["changed_by"].startswith("key:")
    assert http.get(path).json() == told
    assert stored(served, "tuned").queue == QueuePolicy(max_size=7)
    assert http.patch(path, json={"instances": 2}).json() == told
    again = http.delete(path).json()
    assert (again["revision"], again["instances"], again["queue"]["max_size"]) == (2, 1, 0)


def test_a_change_of_another_revision_than_the_newest_is_refused(served: Served, sdk: Client) -> None:
    served.push("raced", models.add())
    assert sdk.configure("raced", {"threads": 1}, revision=0)["revision"] == 1
    with pytest.raises(Conflict, match="at revision 1, not 0; read it again"):
        sdk.configure("raced", {"threads": 2}, revision=0)
    with pytest.raises(Conflict, match="at revision 1"):
        sdk.reset_config("raced", revision=0)
    assert sdk.config("raced")["threads"] == 1


def test_changes_made_at_the_same_time_are_all_made(served: Served, sdk: Client) -> None:
    served.push("crowded", models.add())

    def change(number: int) -> None:
        sdk.configure("crowded", {"labels": {f"l{number}": "x"}})

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = sdk.config("crowded")
    assert (told["revision"], sorted(told["labels"])) == (8, [f"l{number}" for number in range(8)])


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"instances": 0}, "instances"),
        ({"instanses": 1}, "instances"),
        ({"max_batch_size": 65_000}, "max_batch_size"),
        ({"versions": {"specific": [9]}}, "versions.specific"),
        ({"shadows": [{"version": 9}]}, "shadows[0].version"),
        ({"revision": 3}, "revision"),
        ({"instances": 10**30}, ""),
        ({"labels": {"a": "b" * 70_000}}, "65536 bytes"),
        ([], "object"),
    ],
)
def test_a_wrong_change_names_the_field_and_changes_nothing(
    served: Served, http: httpx.Client, patch: Any, field: str
) -> None:
    served.push("checked", models.add())
    answer = http.patch("/v1/models/checked/config", json=patch)
    assert answer.status_code in (400, 413), answer.text
    assert field in answer.json()["error"]
    assert http.get("/v1/models/checked/config").json()["revision"] == 0


def test_a_model_that_is_not_there_has_no_configuration(http: httpx.Client) -> None:
    for answer in (
        http.get("/v1/models/nowhere/config"),
        http.patch("/v1/models/nowhere/config", json={"instances": 1}),
        http.delete("/v1/models/nowhere/config"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


def test_a_push_brings_its_configuration(served: Served, sdk: Client, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(models.add())
    told = sdk.push("brought", tmp_path / "m.onnx", config={"default_priority": "high", "labels": {"zone": "a"}})
    assert told["version"] == 1
    until(lambda: sdk.config("brought")["revision"] == 1, "the gateway has heard of it")
    assert sdk.config("brought")["labels"] == {"zone": "a"}
    sdk.push("brought", tmp_path / "m.onnx", config={"labels": {"zone": "b"}})
    until(lambda: sdk.config("brought")["labels"] == {"zone": "b"}, "a push of what is there changes it too")
    (tmp_path / "n.onnx").write_bytes(models.add(2.0))
    with pytest.raises(InvalidRequest, match="instances"):
        sdk.push("brought", tmp_path / "n.onnx", config={"instances": 0})
    with pytest.raises(InvalidRequest, match="version 3"):
        sdk.push("brought", tmp_path / "n.onnx", config={"versions": {"specific": [3]}})
    assert [version["version"] for version in sdk.model("brought")["versions"]] == [1]
    sdk.push("brought", tmp_path / "n.onnx", config={"versions": {"specific": [2]}})
    with pytest.raises(ModelNotFound):
        sdk.config("never-pushed")


def test_the_command_shows_and_changes_a_configuration(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served.push("commanded", models.add())
    monkeypatch.setenv("TETHER_URL", served.url)
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    runner, app = CliRunner(), application()

    def run(*words: str) -> Any:
        done = runner.invoke(app, ["model", "config", "commanded", *words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    (tmp_path / "c.json").write_text('{"queue": {"max_size": 3}}')
    told = run("--file", str(tmp_path / "c.json"), "--set", "queue.timeout_ms=250", "--set", "default_priority=low")
    assert (told["queue"]["max_size"], told["queue"]["timeout_ms"], told["default_priority"]) == (3, 250.0, "low")
    told = run("--reset", "--set", "versions.latest=2", "--revision", "1")
    assert (told["revision"], told["queue"]["max_size"], told["versions"]["latest"]) == (3, 0, 2)
    shown = runner.invoke(app, ["model", "config", "commanded"])
    assert "versions.latest" in shown.stdout
    assert runner.invoke(app, ["model", "config", "commanded", "--set", "nonsense"]).exit_code == 2


def test_changes_are_in_the_audit_log(served: Served, sdk: Client, http: httpx.Client) -> None:
    served.push("audited", models.add())
    sdk.configure("audited", {"instances": 3})
    with pytest.raises(InvalidRequest):
        sdk.configure("audited", {"versions": {"specific": [5]}})

    def entries() -> list[dict[str, Any]]:
        answer = http.get("/v1/audit", params={"kind": Kind.MODEL.value, "limit": 500})
        assert answer.status_code == 200, answer.text
        return [entry for entry in answer.json()["entries"] if entry.get("model") == "audited"]

    until(lambda: sum(entry["action"] == "config change" for entry in entries()) == 2, "both are recorded")
    done, refused = sorted((e for e in entries() if e["action"] == "config change"), key=lambda e: e["outcome"] != "ok")
    assert (done["outcome"], done["actor"][:4], "instances" in done["detail"]) == ("ok", "key:", True)
    assert refused["outcome"] == "invalid_request"
