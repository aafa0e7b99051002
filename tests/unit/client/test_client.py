"""The client over real sockets: where it connects, what it streams, and what a broken connection becomes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.http.drive import done, job
from support.http.http_servers import Answer, serving

from tether import AsyncClient, Client
from tether.client.address import DEFAULT_URL, resolve, resolve_key, resolve_url
from tether.domain.job import JobState
from tether.domain.tensor import from_numpy, to_numpy
from tether.environment import ClientEnvironment, client_environment
from tether.errors import ConfigError, DeadlineExceeded, ModelNotFound, Unavailable
from tether.process.data_dir import Home, write_secret
from tether.wire import oip

EMPTY = ClientEnvironment("", "", "/nonexistent")


# where it connects


def test_the_argument_comes_before_the_environment_and_that_before_what_runs(tmp_path: Path) -> None:
    home = Home(tmp_path)
    running = ClientEnvironment("", "", str(tmp_path))
    assert resolve_url(None, running) == DEFAULT_URL
    write_secret(home.endpoints, b'{"http": "http://127.0.0.1:4242"}')
    assert resolve_url(None, running) == "http://127.0.0.1:4242"
    assert resolve_url(None, ClientEnvironment("https://a.example/", "", str(tmp_path))) == "https://a.example"
    assert resolve_url("http://b.example", ClientEnvironment("https://a.example", "", "")) == "http://b.example"


@pytest.mark.parametrize("url", ["nonsense", "ftp://a", "http://", "a.example:8000"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        resolve_url(url, EMPTY)


@pytest.mark.parametrize("url", ["http://a b", "http://[::1", "http://a:port"])
def test_urls_that_cannot_be_parsed_are_refused_too(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Client(url)


def test_the_admin_key_is_shown_to_this_machine_only(tmp_path: Path) -> None:
    environment = ClientEnvironment("", "", str(tmp_path))
    assert resolve_key("http://127.0.0.1:8000", None, environment) == ""
    write_secret(Home(tmp_path).admin_key, b"tk_admin\n")
    assert resolve_key("http://127.0.0.1:8000", None, environment) == "tk_admin"
    assert resolve_key("http://localhost:1", None, environment) == "tk_admin"
    assert resolve_key("http://127.0.0.1.evil.example", None, environment) == ""
    assert resolve_key("https://a.example", None, environment) == ""
    assert resolve_key("http://127.0.0.1", "given", environment) == "given"
    assert resolve_key("http://a.example", None, ClientEnvironment("", "env", "")) == "env"
    Home(tmp_path).admin_key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        resolve_key("http://127.0.0.1", None, environment)


def test_the_environment_is_read_when_a_client_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TETHER_URL", "http://c.example")
    monkeypatch.setenv("TETHER_API_KEY", "k")
    monkeypatch.setenv("TETHER_HOME", str(tmp_path))
    assert client_environment() == ClientEnvironment("http://c.example", "k", str(tmp_path))
    assert resolve(None, None) == ("http://c.example", "k")
    with Client() as client:
        assert client.url == "http://c.example"


# requests and answers


def infer_answer(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any]:
    request = oip.parse_infer_request(body, int(handler.headers[oip.HEADER_LENGTH]))
    if handler.headers["x-api-key"] != "k" or "/models/m/" not in handler.path:
        return 404, {"error": "there is no model", "code": "model_not_found"}
    return 200, oip.build_infer_response(
        model="m",
        version=1,
        request=oip.InferRequest("", ()),
        outputs=[from_numpy("y", to_numpy(request.inputs[0]) * 2)],
    )[0]


X = np.arange(4, dtype=np.float32)


def test_blocking_and_asynchronous_clients_do_the_same() -> None:
    async def asynchronous(url: str) -> Any:
        async with AsyncClient(url, "k") as client:
            with pytest.raises(ModelNotFound):
                await client.infer("n", {"x": X})
            assert client.url == url
            return await client.infer("m", {"x": X})

    with serving(infer_answer) as url:
        with Client(url, "k") as client:
            with pytest.raises(ModelNotFound):
                client.infer("n", {"x": X})
            blocking = client.infer("m", {"x": X})
        np.testing.assert_array_equal(blocking["y"], X * 2)
        np.testing.assert_array_equal(asyncio.run(asynchronous(url))["y"], X * 2)


def test_a_push_sends_what_is_missing_and_tells_how_far_it_is(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(9 << 20)
    file = tmp_path / "any name.onnx"
    file.write_bytes(content)
    stored: dict[str, bytes] = {}

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any]:
        if handler.path.endswith("chunks:missing"):
            return 200, {"missing": [digest for digest in json.loads(body)["chunks"] if digest not in stored]}
        if handler.command == "PUT":
            assert handler.path.rsplit("/", 1)[1] == hashlib.sha256(body).hexdigest()
            stored[hashlib.sha256(body).hexdigest()] = body
            return 201, {}
        (told,) = json.loads(body)["files"]
        whole = b"".join(stored[digest] for digest in told["chunks"])
        right = whole == content and told["digest"] == hashlib.sha256(content).hexdigest()
        return 201, {"path": told["path"], "size": told["size"], "right": right}

    async def asynchronous(url: str, told: list[int]) -> Any:
        async with AsyncClient(url, "k") as client:
            return await client.push("m", file, progress=told.append)

    expected = {"path": "model.onnx", "size": len(content), "right": True}
    with serving(answer) as url:
        told: list[int] = []
        with Client(url, "k") as client:
            assert client.push("m", file, progress=told.append) == {**expected, "stored_bytes": len(content)}
        assert told == sorted(told)
        assert (told[0], told[-1]) == (0, len(content))
        gone = stored.popitem()[1]
        told.clear()
        assert asyncio.run(asynchronous(url, told)) == {**expected, "stored_bytes": len(gone)}
        assert told == [len(content) - len(gone), len(content)]


def lose_the_first(seen: list[str]) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, Any]:
        seen.append(handler.headers["idempotency-key"])
        return (0, None) if len(seen) == 1 else (202, job())

    return answer


def test_a_lost_answer_is_asked_for_again_under_the_same_key() -> None:
    async def asynchronous(url: str) -> str:
        async with AsyncClient(url, "k") as client:
            return (await client.submit("m", {"x": X})).id

    first: list[str] = []
    with serving(lose_the_first(first)) as url, Client(url, "k") as client:
        assert client.submit("m", {"x": X}).id == "j"
    second: list[str] = []
    with serving(lose_the_first(second)) as url:
        assert asyncio.run(asynchronous(url)) == "j"
    for seen in (first, second):
        assert len(seen) == 2
        assert len(set(seen)) == 1


def test_a_handle_yields_each_state_and_then_the_result() -> None:
    states = [job(), job("running"), job("running"), done()]

    def answer(handler: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, Any]:
        if handler.command == "POST":
            return 202, job()
        if "ids=" in handler.path:
            return 200, {"jobs": [done()]}
        return 200, states.pop(0) if len(states) > 1 else states[0]

    async def asynchronous(url: str) -> list[JobState]:
        async with AsyncClient(url, "k") as client:
            handle = await client.submit("m", {"x": X})
            found = [info.state async for info in handle]
            assert (await handle.result())["y"] == [1.0]
            assert await handle.state() is JobState.SUCCEEDED
            return found

    expected = [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED]
    with serving(answer) as url:
        with Client(url, "k") as client:
            handle = client.submit("m", {"x": X})
            assert [info.state for info in handle] == expected
            assert handle.result(5)["y"] == [1.0]
            assert repr(handle) == "JobHandle('j')"
        states[:] = [job(), job("running"), done()]
        assert asyncio.run(asynchronous(url)) == expected


# broken connections


def test_a_server_that_is_not_there_is_unavailable_and_not_ready() -> None:
    with Client("http://127.0.0.1:1", "k", tries=1) as client:
        assert not client.server_ready()
        with pytest.raises(Unavailable):
            client.models()


def test_a_server_that_does_not_answer_in_time_is_a_deadline() -> None:
    release = threading.Event()

    def answer(_handler: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, Any]:
        release.wait(30)
        return 0, None

    async def asynchronous(url: str) -> None:
        async with AsyncClient(url, "k", timeout=0.2) as client:
            with pytest.raises(DeadlineExceeded):
                await client.models()

    with serving(answer) as url:
        with Client(url, "k", timeout=0.2) as client, pytest.raises(DeadlineExceeded):
            client.models()
        asyncio.run(asynchronous(url))
        release.set()


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {}", "\t{} \n"])
def test_white_space_around_a_key_is_taken_off(around: str, tmp_path: Path) -> None:
    text = around.format("tk_key")
    assert resolve_key("http://a.example", text, ClientEnvironment("", "", "")) == "tk_key"
    assert resolve_key("http://a.example", None, ClientEnvironment("", text, "")) == "tk_key"
    write_secret(Home(tmp_path).admin_key, text.encode())
    assert resolve_key("http://127.0.0.1", " ", ClientEnvironment("", "\n", str(tmp_path))) == "tk_key"


@pytest.mark.parametrize("inside", ["\n", "\r", "\0", " ", "é", "\x7f", "\ud800"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(inside: str, tmp_path: Path) -> None:
    key = f"tk_secret{inside}secret"
    with pytest.raises(ConfigError) as caught:
        resolve_key("http://a.example", None, ClientEnvironment("", key, ""))
    assert "secret" not in caught.value.message
    assert "TETHER_API_KEY" in caught.value.message
    assert "position 10 of 16" in caught.value.message
    with pytest.raises(ConfigError, match="api_key"):
        resolve_key("http://a.example", key, ClientEnvironment("", "", ""))
    write_secret(Home(tmp_path).admin_key, key.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"admin\.key"):
        resolve_key("http://127.0.0.1", None, ClientEnvironment("", "", str(tmp_path)))
