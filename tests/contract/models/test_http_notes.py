"""Labels and notes of versions, over HTTP, the SDK and the command line."""

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
from tether.bus.key_value.bucket import KvBucket
from tether.bus.session import connect
from tether.errors import InvalidRequest, ModelNotFound
from tether_cli.main import application


def shown(sdk: Client, name: str, version: int) -> tuple[dict[str, str], str]:
    (found,) = [one for one in sdk.model(name)["versions"] if one["version"] == version]
    return found["labels"], found["note"]


def test_a_version_gets_labels_and_a_note_and_stays_what_it_is(served: Served, sdk: Client) -> None:
    served.push("noted", models.add())
    before = sdk.model("noted")["versions"][0]
    told = sdk.annotate("noted", 1, labels={"data": "2026-10", "team": "vision"}, note="trained twice\nkeep")
    assert (told["revision"], told["changed_by"][:4]) == (1, "key:")
    assert shown(sdk, "noted", 1) == ({"data": "2026-10", "team": "vision"}, "trained twice\nkeep")
    assert sdk.annotate("noted", 1, labels={"team": None, "seed": "7"})["note"] == "trained twice\nkeep"
    assert shown(sdk, "noted", 1)[0] == {"data": "2026-10", "seed": "7"}
    assert sdk.annotate("noted", 1, note="")["note"] == ""
    after = sdk.model("noted")["versions"][0]
    assert {**after, "labels": {}, "note": ""} == before
    (entry,) = [one for one in sdk.models() if one["name"] == "noted"]
    assert entry["labels"] == {"data": "2026-10", "seed": "7"}


def test_labels_that_are_given_at_the_same_time_are_all_kept(served: Served, sdk: Client) -> None:
    served.push("labelled", models.add())

    def label(number: int) -> None:
        sdk.annotate("labelled", 1, labels={f"l{number}": "x"})

    threads = [threading.Thread(target=label, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(shown(sdk, "labelled", 1)[0]) == [f"l{number}" for number in range(8)]


def test_a_push_brings_labels_and_a_note(served: Served, sdk: Client, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(models.add())
    sdk.push("pushed-noted", tmp_path / "m.onnx", labels={"stage": "new"}, note="the first")
    until(lambda: shown(sdk, "pushed-noted", 1) == ({"stage": "new"}, "the first"), "the gateway has heard of them")
    (tmp_path / "n.onnx").write_bytes(models.add(2.0))
    with pytest.raises(InvalidRequest, match="label"):
        sdk.push("pushed-noted", tmp_path / "n.onnx", labels={"x" * 65: "y"})
    assert [one["version"] for one in sdk.model("pushed-noted")["versions"]] == [1]
    sdk.push("pushed-noted", tmp_path / "n.onnx")
    assert shown(sdk, "pushed-noted", 2) == ({}, "")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"labels": {"": "x"}}, "a label must have"),
        ({"labels": {"zone": "a\nb"}}, "a label must have"),
        ({"labels": {f"l{number}": "x" for number in range(17)}}, "at most 16 labels"),
        ({"note": "x" * 2001}, "note must have at most"),
        ({"note": "a\x1b[31m"}, "note must have at most"),
        ({"labels": {"zone": 5}}, "labels"),
        ({"notes": "x"}, "notes"),
        ({"l" * 5000: "x"}, "lll"),
    ],
)
def test_what_does_not_fit_is_refused(served: Served, http: httpx.Client, body: Any, words: str) -> None:
    served.push("strict", models.add())
    answer = http.patch("/v1/models/strict/versions/1", json=body)
    assert (answer.status_code, words in answer.json()["error"]) == (400, True), answer.text
    assert http.get("/v1/models/strict").json()["versions"][0]["labels"] == {}


def test_only_versions_that_are_there_have_notes(served: Served, sdk: Client, http: httpx.Client) -> None:
    served.push("short-lived", models.add(1.0))
    served.push("short-lived", models.add(2.0))
    with pytest.raises(ModelNotFound):
        sdk.annotate("short-lived", 9, note="x")
    with pytest.raises(ModelNotFound):
        sdk.annotate("nowhere", 1, note="x")
    assert http.patch("/v1/models/short-lived/versions/latest", json={"note": "x"}).status_code == 400
    sdk.annotate("short-lived", 1, note="gone soon")
    sdk.delete_model("short-lived", 1)

    async def stored() -> bytes | None:
        async with connect(served.services.settings, served.home, "modelstore") as bus:
            return await KvBucket(bus, "notes").get(bus.names.version_key("short-lived", 1))

    assert served.run(stored()) is None


def test_the_commands_show_and_set_them(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TETHER_URL", served.url)
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    runner, app = CliRunner(), application()

    def run(*words: str) -> str:
        done = runner.invoke(app, ["model", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        said.append(done.stderr)
        return done.stdout

    said: list[str] = []
    (tmp_path / "m.onnx").write_bytes(models.add())
    run("push", "spoken", str(tmp_path / "m.onnx"), "--label", "stage=test", "--note", "by hand")
    assert (
        "inputs: x FP32 [-1, 4]\noutputs: y FP32 [-1, 4]\nbatched: up to 512 rows a run, proven from the graph"
        in said[0]
    )
    (tmp_path / "mixing.onnx").write_bytes(models.unknown_operator())
    run("push", "alone-spoken", str(tmp_path / "mixing.onnx"))
    assert "not batched: " in said[1]
    run("push", "alone-spoken", str(tmp_path / "mixing.onnx"), "--max-batch-size", "8")
    assert "batched: up to 8 rows a run, declared by you, the publisher" in said[2]
    told = json.loads(run("note", "spoken", "1", "--label", "stage", "--label", "owner=ops", "--json"))
    assert (told["labels"], told["note"]) == ({"owner": "ops"}, "by hand")
    assert "by hand" in run("note", "spoken", "1", "--note", "by hand")
    (line,) = [line for line in run("list").splitlines() if line.startswith("spoken")]
    assert "owner=ops" in line
    assert json.loads(run("show", "spoken", "--json"))["versions"][0]["note"] == "by hand"
