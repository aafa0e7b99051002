"""Encrypted models on a real broker: nobody reads them on a disk, and everything works as with others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from nats.js import JetStreamContext
from support.brokers.operators import operator
from support.http.served import Served, until
from support.models import bundles
from support.platform.encryption import (
    MB,
    answers,
    collected,
    digests,
    fetched,
    found_below,
    loaded,
    manifest,
    model_file,
    ours_in_memory,
    pattern,
    platform,
)

from tether import Client
from tether.broker.embedded_server import Binary
from tether.domain.manifest import ModelRef
from tether.errors import CorruptChunk, TetherError, TmpfsUnavailable

Pair = tuple[Served, Client]


@pytest.fixture(scope="module")
def pair(nats_binary: Binary) -> Iterator[Pair]:
    with platform(nats_binary) as made:
        yield made


@pytest.mark.parametrize("encrypt", [True, False])
def test_no_disk_holds_an_encrypted_model_in_the_clear(nats_binary: Binary, tmp_path: Path, encrypt: bool) -> None:
    """Neither the broker's files nor anything else below the home, which has the worker's cache and assembled files and the
    model store's scratch; and what is searched for is found when the model is not encrypted."""
    source = model_file(tmp_path / "model.onnx")
    weights, names = pattern(source), digests(source)
    with platform(nats_binary) as (running, sdk):
        told = sdk.push("m", source, encrypt=encrypt)
        assert (told["version"], told["encrypted"]) == (1, encrypt)
        loaded(running, "m", 1)
        home = running.home
        assert bool(found_below(home.nats_store, weights)) is not encrypt
        assert bool(found_below(home.nats_store, *names)) is not encrypt
        assert bool(found_below(home.cache("worker-1"), weights)) is not encrypt
        assert bool(found_below(home.root, weights, *names)) is not encrypt
        assert bool(ours_in_memory(running)) is encrypt
        memory = running.services.workers[0].holder.files._memory._own
        sdk.pull("m", tmp_path / "out")
        assert (tmp_path / "out" / "model.onnx").read_bytes() == source.read_bytes()
    assert not list(memory.glob("*/*"))


def test_a_new_version_moves_and_fetches_only_what_changed(pair: Pair, tmp_path: Path) -> None:
    running, sdk = pair
    first, second = model_file(tmp_path / "one.onnx", 12 * MB, 5), tmp_path / "two.onnx"
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    whole = sdk.push("deduped", first, encrypt=True)
    assert whole["stored_bytes"] >= 12 * MB
    loaded(running, "deduped", 1)
    before = fetched()
    changed = sdk.push("deduped", second)
    assert changed["encrypted"]
    assert 0 < changed["stored_bytes"] <= 4 * MB
    loaded(running, "deduped", 2)
    assert fetched() - before == changed["stored_bytes"]
    shared = set(manifest(running, "deduped", 1).files[0].chunks) & set(manifest(running, "deduped", 2).files[0].chunks)
    assert shared
    again = sdk.push("deduped", second)
    assert (again["version"], again["stored_bytes"]) == (2, 0)


def test_a_model_stays_encrypted_unless_it_is_said_otherwise(pair: Pair, tmp_path: Path) -> None:
    running, sdk = pair
    sources = [model_file(tmp_path / f"{seed}.onnx", MB, seed) for seed in range(20, 25)]
    assert not sdk.push("kept", sources[0])["encrypted"]
    assert sdk.push("kept", sources[1], encrypt=True)["encrypted"]
    assert sdk.push("kept", sources[2])["encrypted"]
    assert not sdk.push("kept", sources[3], encrypt=False)["encrypted"]
    with running.client() as http:
        answer = http.post("/v1/models/kept/versions", content=sources[4].read_bytes())
        assert (answer.status_code, answer.json()["encrypted"]) == (201, True)
        assert answer.json()["digest"] == hashlib.sha256(sources[4].read_bytes()).hexdigest()
        plain = http.post("/v1/models/kept/versions?encrypt=false", content=sources[4].read_bytes())
        assert (plain.status_code, plain.json()["version"], plain.json()["encrypted"]) == (201, 6, False)
    until(lambda: len(sdk.model("kept")["versions"]) == 6, "the gateway knows all of them")
    shown = sdk.model("kept")["versions"]
    assert [row["encrypted"] for row in shown] == [False, True, True, False, True, False]
    assert [row["key_generation"] for row in shown] == [0, 1, 1, 0, 1, 0]
    assert shown[1]["files"][0]["digest"] == hashlib.sha256(sources[1].read_bytes()).hexdigest()
    answers(running, "kept", 5)


def test_a_push_that_broke_off_goes_on_where_it_was(pair: Pair, tmp_path: Path) -> None:
    running, sdk = pair
    source = model_file(tmp_path / "model.onnx", 10 * MB, 31)
    sent: list[int] = []

    class Broken(Exception):
        """The client died."""

    def progress(done: int) -> None:
        sent.append(done)
        if len(sent) == 4:
            raise Broken

    with pytest.raises(Broken):
        sdk.push("resumed", source, encrypt=True, progress=progress)
    assert "resumed" not in {model["name"] for model in sdk.models()}
    told = sdk.push("resumed", source, encrypt=True)
    assert 0 < told["stored_bytes"] <= 10 * MB + 4096 - sent[2]
    answers(running, "resumed", 1)


def test_the_nats_object_store_reads_what_lies_there(pair: Pair, tmp_path: Path) -> None:
    """Which is the ciphertext: its size and its digest are those that the meta message has."""
    running, sdk = pair
    source = model_file(tmp_path / "model.onnx", 3 * MB, 41)
    sdk.push("object", source, encrypt=True)
    answers(running, "object", 1)
    (file,) = manifest(running, "object", 1).files

    async def read() -> list[bytes]:
        async with operator(running.services.home, running.services.settings) as bus:
            store = await JetStreamContext(bus._client).object_store("TETHER_CHUNKS_0")
            return [(await store.get(name)).data or b"" for name in file.chunks]

    stored = running.run(read())
    assert sum(map(len, stored)) == file.size + 41 * len(file.chunks)
    assert all(data[24:88] not in source.read_bytes() for data in stored)


@pytest.mark.parametrize("content", [b"evil", None])
def test_a_damaged_chunk_is_named_marked_and_mended_by_a_push(
    pair: Pair, tmp_path: Path, content: bytes | None
) -> None:
    running, sdk = pair
    name = f"damaged-{content is None}".lower()
    source = model_file(tmp_path / "model.onnx", 5 * MB, 50 + (content is None))
    sdk.push(name, source, encrypt=True)
    answers(running, name, 1)
    bus = running.services.bus
    chunks = manifest(running, name, 1).files[0].chunks
    other = running.run(bus.direct_get(bus.names.object_stream("TETHER_CHUNKS_0"), _subject(running, chunks[0])))
    assert other is not None
    for worker in running.services.workers:  # one that has it intact would mend it
        cache = worker.holder.files.cache
        until(lambda cache=cache: cache.held([chunks[1]]), "the worker keeps the chunk")
        cache.drop("disk")
    running.run(bus.publish_acked(_subject(running, chunks[1]), other.data if content is None else content))
    with pytest.raises(CorruptChunk, match=chunks[1]):
        sdk.pull(name, tmp_path / "out")
    sdk.scrub()
    until(lambda: [row["digest"] for row in sdk.store()["damaged"]] == [chunks[1]], "it is found")
    assert sdk.push(name, source)["stored_bytes"] > 0
    assert sdk.store()["damaged"] == []
    sdk.pull(name, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == source.read_bytes()


def _subject(running: Served, name: str) -> str:
    return running.services.bus.names.object_chunk("TETHER_CHUNKS_0", name)


def test_chunks_of_a_deleted_version_go_and_those_of_others_stay(nats_binary: Binary, tmp_path: Path) -> None:
    with platform(nats_binary) as (running, sdk):
        first, second = model_file(tmp_path / "1.onnx", 3 * MB, 61), model_file(tmp_path / "2.onnx", 3 * MB, 62)
        sdk.push("m", first, encrypt=True)
        sdk.push("m", second)
        answers(running, "m", 2)
        sdk.delete_model("m", 1)
        running.run(collected(running))
        told = sdk.store()
        assert (told["chunks"], told["damaged"]) == (told["named_chunks"], [])
        assert told["stored_bytes"] < 4 * MB
        sdk.pull("m", tmp_path / "out")
        assert (tmp_path / "out" / "model.onnx").read_bytes() == second.read_bytes()


def test_a_model_in_a_process_of_its_own_has_its_files_in_memory_and_takes_them_along(
    pair: Pair, tmp_path: Path
) -> None:
    running, sdk = pair
    folder = bundles.write(tmp_path / "bundle", bias=2.5)
    sdk.push("own-process", folder, encrypt=True)
    until(lambda: "own-process" in {model["name"] for model in sdk.models()}, "the gateway knows it")
    with running.client() as http:
        until(lambda: http.get("/v2/models/own-process/ready").status_code == 200, "it is ready", 40)
    holder = running.services.workers[0].holder
    ref = ModelRef("own-process", 1)
    digest = holder.files._held[ref].digest
    assert [path for path in ours_in_memory(running) if digest in path.parts]
    assert not (running.home.cache("worker-1") / digest).exists()
    assert sdk.infer("own-process", {"x": [[1.0, 2.0, 3.0, 4.0]]})["y"].tolist() == [[3.5, 4.5, 5.5, 6.5]]
    sdk.delete_alias("own-process", "latest")
    sdk.delete_model("own-process", 1)
    until(lambda: ref not in holder.ready(), "it is unloaded")
    until(lambda: not [path for path in ours_in_memory(running) if digest in path.parts], "its files are gone")


def test_without_a_place_in_memory_a_push_is_refused_and_says_what_to_do(nats_binary: Binary, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.onnx", MB, 71)
    with platform(nats_binary, decrypted_model_dir=str(tmp_path)) as (running, sdk):
        with pytest.raises(TmpfsUnavailable, match="decrypted_model_dir") as refused:
            sdk.push("m", source, encrypt=True, timeout=5)
        assert str(tmp_path) not in refused.value.message
        assert not sdk.push("m", source, encrypt=False)["encrypted"]
        answers(running, "m", 1)
        assert not found_below(running.home.nats_store, b"no such thing as this")


def test_a_model_that_has_no_key_cannot_be_given_another(pair: Pair, tmp_path: Path) -> None:
    _, sdk = pair
    sdk.push("plain", model_file(tmp_path / "model.onnx", MB, 81))
    with pytest.raises(TetherError, match="not encrypted"):
        sdk.rekey("plain")


def test_who_may_not_read_a_model_gets_no_chunk_of_it(pair: Pair, tmp_path: Path) -> None:
    running, sdk = pair
    sdk.push("secret", model_file(tmp_path / "model.onnx", MB, 91), encrypt=True)
    answers(running, "secret", 1)
    key = running.new_key("infer")
    with httpx.Client(base_url=running.url, headers={"x-api-key": key}, trust_env=False) as http:
        assert http.get("/v1/models/secret/versions/1/files").status_code == 403
        assert http.post("/v1/models/secret/rekey").status_code == 403
