"""Fetching a version's files over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from support.http.served import Served, until
from support.models import bundles, models

from tether import Client
from tether.errors import Conflict, ModelNotFound, NotFound


def test_what_was_pushed_is_pulled(served: Served, sdk: Client, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(models.padded(9 << 20, seed=77))
    sdk.push("pulled", source)
    until(lambda: "pulled" in {model["name"] for model in sdk.models()}, "the gateway knows it")
    seen: list[int] = []
    told = sdk.pull("pulled", tmp_path / "out", progress=seen.append)
    assert (told["version"], told["files"], told["size"]) == (1, ["model.onnx"], source.stat().st_size)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == source.read_bytes()
    assert (seen[0], seen[-1]) == (0, source.stat().st_size)
    assert sorted(set(seen)) == seen, "it only grows"
    assert sdk.pull("pulled", tmp_path / "out", version=1) == told
    (tmp_path / "out" / "model.onnx").write_bytes(b"mine")
    with pytest.raises(Conflict, match="other content"):
        sdk.pull("pulled", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    with pytest.raises(ModelNotFound):
        sdk.pull("pulled", tmp_path / "none", version=7)


def test_a_chunk_is_sent_as_it_is_whatever_the_client_takes(served: Served, sdk: Client, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(models.padded(2 << 20, seed=78))
    sdk.push("unpacked", source)
    until(lambda: "unpacked" in {model["name"] for model in sdk.models()}, "the gateway knows it")
    with served.client() as http:
        path = "/v1/models/unpacked/versions/1"
        (file,) = http.get(f"{path}/files").json()["files"]
        answer = http.get(f"{path}/chunks/{file['chunks'][0]}", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert hashlib.sha256(answer.content).hexdigest() == file["chunks"][0]


def test_a_push_waits_for_the_gateway_to_know_the_version(served: Served) -> None:
    catalog = served.services.gateway.catalog

    async def heard() -> tuple[bool, bool]:
        waiting = asyncio.create_task(catalog.wait_for_version("waited-for", 1))
        await asyncio.sleep(0)
        early = waiting.done()
        await served.services.push("waited-for", models.add())
        await waiting
        return early, 1 in catalog.versions("waited-for")

    assert served.run(heard()) == (False, True)


def test_what_was_pushed_can_be_looked_at_at_once(sdk: Client, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    for number in range(12):
        source.write_bytes(models.add(float(number)))
        version = sdk.push("at-once", source)["version"]
        assert version in {one["version"] for one in sdk.model("at-once")["versions"]}
        assert sdk.pull("at-once", tmp_path / str(version), version=version)["version"] == version


def test_a_folder_comes_back_as_a_folder(sdk: Client, tmp_path: Path) -> None:
    folder = bundles.write(tmp_path / "bundle", bias=1.25)
    sdk.push("pulled-folder", folder)
    until(lambda: "pulled-folder" in {model["name"] for model in sdk.models()}, "the gateway knows it")
    sdk.pull("pulled-folder", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_chunk_is_given_only_as_part_of_a_version_that_may_be_read(
    served: Served, sdk: Client, tmp_path: Path
) -> None:
    for name in ("mine", "theirs"):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(models.padded(1 << 20, seed=len(name)))
        sdk.push(f"chunk-{name}", path)
        until(lambda name=name: f"chunk-{name}" in {model["name"] for model in sdk.models()}, "it is known")
    with served.client() as http:
        theirs = http.get("/v1/models/chunk-theirs/versions/1/files").json()["files"][0]["chunks"][0]
        assert http.get(f"/v1/models/chunk-theirs/versions/latest/chunks/{theirs}").status_code == 200
        refused = http.get(f"/v1/models/chunk-mine/versions/1/chunks/{theirs}")
        assert (refused.status_code, refused.json()["code"]) == (404, NotFound.code)
