"""Resumable pushes over HTTP: chunks one by one, then the version they make up."""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
from support.http.served import Served
from support.models import models

from tether import Client
from tether.client.pushing.local_model import LocalFile, local_model
from tether.errors import Conflict


@pytest.fixture
def model(tmp_path: Path, request: pytest.FixtureRequest) -> LocalFile:
    """A model whose chunks no other test stores."""
    path = tmp_path / "model.onnx"
    path.write_bytes(models.padded(8 << 20, seed=zlib.crc32(request.node.name.encode())))
    (described,) = local_model(path).files
    assert len(described.chunks) > 2
    return described


def chunk(model: LocalFile, number: int) -> tuple[str, bytes]:
    digest, offset, size = model.chunks[number]
    return digest, model.source.read_bytes()[offset : offset + size]


def test_a_push_that_broke_off_goes_on_where_it_was(served: Served, http: httpx.Client, model: LocalFile) -> None:
    name = "resumed"
    digest, content = chunk(model, 1)
    first = http.put(f"/v1/models/{name}/chunks/{digest}", content=content)
    assert (first.status_code, first.json()) == (
        201,
        {"digest": digest, "size": len(content), "stored_bytes": len(content)},
    )
    again = http.put(f"/v1/models/{name}/chunks/{digest}", content=content)
    assert (again.status_code, again.json()["stored_bytes"]) == (200, 0)
    asked = [entry[0] for entry in model.chunks]
    missing = http.post(f"/v1/models/{name}/chunks:missing", json={"chunks": asked}).json()["missing"]
    assert missing == [entry for entry in asked if entry != digest]
    assert http.get(f"/v1/models/{name}").status_code == 404
    with Client(served.url, served.key) as client:
        told = client.push(name, model.source)
    assert (told["version"], told["size"], told["stored_bytes"]) == (1, model.size, model.size - len(content))
    assert told["digest"] == hashlib.sha256(model.source.read_bytes()).hexdigest()
    with Client(served.url, served.key) as client:
        same = client.push(name, model.source)
    assert (same["version"], same["stored_bytes"]) == (1, 0)


def test_a_version_needs_all_of_its_chunks(http: httpx.Client, model: LocalFile) -> None:
    for number in range(1, len(model.chunks)):
        digest, content = chunk(model, number)
        assert http.put(f"/v1/models/torn/chunks/{digest}", content=content).is_success
    first = model.chunks[0][0]
    refused = http.post("/v1/models/torn/versions:register", json={"files": [model.described()]})
    assert (refused.status_code, refused.json()["code"]) == (503, "corrupt_chunk")
    assert first in refused.json()["error"]
    assert http.get("/v1/models/torn").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("PUT", "chunks/" + "0" * 64, b"something else", 400, "SHA-256"),
        ("PUT", "chunks/" + "A" * 64, b"x", 400, "64 lower-case hex"),
        ("PUT", "chunks/..%2f..", b"x", 404, "no route matches"),
        ("PUT", "chunks/" + "0" * 64, bytes((4 << 20) + 1), 413, "at most"),
        ("POST", "chunks:missing", b'{"chunks": ["../x"]}', 400, "64 lower-case hex"),
        ("POST", "chunks:missing", b"{}", 400, "chunks"),
        ("POST", "versions:register", b'{"files": []}', 400, "files"),
    ],
)
def test_what_is_no_chunk_is_refused(
    http: httpx.Client, *, method: str, path: str, body: bytes, status: int, word: str
) -> None:
    answer = http.request(method, f"/v1/models/m/{path}", content=body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"path": "../../etc/passwd"}, "cannot be stored"),
        ({"path": "other.onnx"}, "model.onnx"),
        ({"sizes": [1]}, "one size each"),
        ({"size": 0}, "add up"),
        ({"chunks": ["zz"]}, "SHA-256"),
    ],
)
def test_a_description_that_does_not_add_up_is_refused(
    http: httpx.Client, model: LocalFile, change: dict[str, object], word: str
) -> None:
    for number in range(len(model.chunks)):
        digest, content = chunk(model, number)
        assert http.put(f"/v1/models/m/chunks/{digest}", content=content).is_success
    answer = http.post("/v1/models/m/versions:register", json={"files": [{**model.described(), **change}]})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]


def test_of_two_clients_that_push_the_same_version_one_wins(served: Served, tmp_path: Path) -> None:
    """The other is told so, and nothing of it is there; the same push again, by whoever, is no other push."""
    name, count = "contested", 6
    paths = [tmp_path / f"{number}.onnx" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(models.add(float(number)))

    def attempt(path: Path, version: int) -> str | int:
        with Client(served.url, served.key) as client:
            try:
                return int(client.push(name, path, version=version)["version"])
            except Conflict as error:
                return error.message

    for version in (1, 2):
        with ThreadPoolExecutor(count) as pool:
            ends = list(pool.map(attempt, paths[version - 1 :], [version] * count))
        assert ends.count(version) == 1
        assert sum(f"the next version is {version + 1}" in str(end) for end in ends) == len(ends) - 1
        winner = paths[version - 1 + ends.index(version)]
        assert attempt(winner, version) == version
    with served.client() as http:
        shown = http.get(f"/v1/models/{name}").json()
        assert [found["version"] for found in shown["versions"]] == [1, 2]
        late = http.post(f"/v1/models/{name}/versions", content=models.add(99.0), params={"version": 2})
        assert (late.status_code, late.json()["code"]) == (409, "conflict")
        early = http.post(f"/v1/models/{name}/versions", content=models.add(99.0), params={"version": 7})
        assert early.status_code == 409
        assert (
            http.post(f"/v1/models/{name}/versions", content=models.add(99.0), params={"version": 3}).status_code == 201
        )


def patterned(served: Served, tenant: str, *patterns: str) -> httpx.Client:
    """A client of another tenant, which sees models of these names only."""
    key = served.new_key("infer", "models:read", "models:write", tenant=tenant)
    record = next(one for one in served.services.gateway.keys.known() if one.tenant == tenant)
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(record, models=patterns)))
    return httpx.Client(base_url=served.url, headers={"x-api-key": key}, timeout=60, trust_env=False)


def test_who_knows_the_digests_of_a_file_does_not_have_it(served: Served, model: LocalFile) -> None:
    """Neither by asking, nor by registering, nor by what sending a chunk tells."""
    with Client(served.url, served.key) as client:
        client.push("secret-one", model.source)
    asked = [entry[0] for entry in model.chunks]
    with patterned(served, "knower", "taken-*") as thief:
        assert thief.get("/v1/models/secret-one").status_code == 404
        told = thief.post("/v1/models/taken-one/chunks:missing", json={"chunks": asked}).json()["missing"]
        assert told == asked, "as if nobody had them"
        refused = thief.post("/v1/models/taken-one/versions:register", json={"files": [model.described()]})
        assert (refused.status_code, refused.json()["code"]) == (503, "corrupt_chunk")
        absent = {**model.described(), "chunks": [hashlib.sha256(digest.encode()).hexdigest() for digest in asked]}
        other = thief.post("/v1/models/taken-one/versions:register", json={"files": [absent]})
        assert other.json()["error"] == refused.json()["error"].replace(asked[0], absent["chunks"][0])
        digest, content = chunk(model, 0)
        sent = thief.put(f"/v1/models/taken-one/chunks/{digest}", content=content)
        assert (sent.status_code, sent.json()["stored_bytes"]) == (201, len(content)), "as if nobody had it"
        again = thief.put(f"/v1/models/taken-one/chunks/{digest}", content=content)
        assert (again.status_code, again.json()["stored_bytes"]) == (200, 0)
        told = thief.post("/v1/models/taken-one/chunks:missing", json={"chunks": asked}).json()["missing"]
        assert told == asked[1:]


def test_who_has_a_file_that_another_tenant_has_pushes_it_and_the_store_has_it_once(
    served: Served, model: LocalFile
) -> None:
    with Client(served.url, served.key) as client:
        client.push("theirs", model.source)

    def chunks() -> int:
        names, bus = served.services.bus.names, served.services.bus
        stream = names.object_stream(names.chunk_bucket("theirs"))
        return int(served.run(bus.api(f"STREAM.INFO.{stream}"))["state"]["messages"])

    before = chunks()
    with patterned(served, "owner", "ours-*") as other, Client(served.url, other.headers["x-api-key"]) as client:
        told = client.push("ours-one", model.source)
        assert (told["version"], told["stored_bytes"]) == (1, model.size)
        whole = other.post("/v1/models/ours-two/versions", content=model.source.read_bytes())
        assert (whole.status_code, whole.json()["stored_bytes"]) == (201, model.size), "nor does a whole body tell"
    assert chunks() == before


def test_what_was_sent_to_one_gateway_counts_at_another(served: Served, model: LocalFile) -> None:
    name = "elsewhere"
    for number in range(len(model.chunks)):
        digest, content = chunk(model, number)
        with served.client() as http:
            assert http.put(f"/v1/models/{name}/chunks/{digest}", content=content).is_success
    served.services.gateway.chunk_possession._own.clear()  # as of a gateway that none was sent to
    with served.client() as http:
        made = http.post(f"/v1/models/{name}/versions:register", json={"files": [model.described()]})
        assert made.status_code == 201, made.text


def test_a_version_of_a_model_may_be_made_of_chunks_of_its_others(served: Served, model: LocalFile) -> None:
    with Client(served.url, served.key) as client:
        client.push("grown", model.source)
        for tenant in ("reader", "writer"):
            client.grants.grant("grown", tenant, "write")
    possession, asked = served.services.gateway.chunk_possession, [entry[0] for entry in model.chunks]
    possession._own.clear()
    with patterned(served, "reader", "grown") as other:
        told = other.post("/v1/models/grown/chunks:missing", json={"chunks": asked}).json()["missing"]
        assert told == [], "it may read them"
    with patterned(served, "writer", "grown") as other:
        record = next(one for one in served.services.gateway.keys.known() if one.tenant == "writer")
        blind = msgspec.structs.replace(record, scopes=("models:write",))
        served.run(served.services.gateway.keys.store(blind))
        told = other.post("/v1/models/grown/chunks:missing", json={"chunks": asked}).json()["missing"]
        assert told == asked, "it may not"


def test_a_digest_with_more_in_it_reaches_no_subject(served: Served, model: LocalFile) -> None:
    described = {**model.described(), "chunks": ["*", *model.described()["chunks"][1:]]}
    with served.client() as http:
        answer = http.post("/v1/models/wild/versions:register", json={"files": [described]})
        assert (answer.status_code, "SHA-256" in answer.json()["error"]) == (400, True)
