"""Identities of a running platform, changed through the command line while requests flow."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from support.brokers.brokers import temporary_home, wait_until
from support.platform.platforms import ROOT, Platform, platform, tether

from bench.load import HEAD_END, content_length
from tether.bus.session import connect
from tether.crypto import is_locked
from tether.errors import ConfigError
from tether.identity.keys import read_keyset
from tether.process.data_dir import Home, load_identity
from tether.settings import Settings

DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
RATE = 500
CALLERS = 25
LIMIT_S = 2.0
Note = Callable[[str, object], None]


@pytest.fixture
def running() -> Iterator[Platform]:
    with platform(workers=2) as started:
        pushed = started.run("model", "push", "digits", str(DIGITS))
        assert pushed.returncode == 0, pushed.stderr
        yield started


async def command(running: Platform, *words: str) -> Any:
    """Run ``tether ... --json`` beside what the test does, and decode what it prints."""
    done = await asyncio.to_thread(running.run, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Load:
    """RATE requests a second, whatever happens; every answer's status and how long it took."""

    def __init__(self, running: Platform) -> None:
        address = urlsplit(running.url)
        self._host, self._port = str(address.hostname), int(address.port or 0)
        body = json.dumps({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [1.0] * 64}]})
        self._request = (
            f"POST /v2/models/digits/infer HTTP/1.1\r\nhost: {self._host}\r\nx-api-key: {running.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self.statuses: dict[str, int] = {}
        self.slowest = 0.0
        self.sent = 0

    async def caller(self, number: int, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        turn = loop.time() + number / RATE
        try:
            while not stop.is_set():
                await asyncio.sleep(max(0.0, turn - loop.time()))
                turn += CALLERS / RATE
                began = loop.time()
                writer.write(self._request)
                self.sent += 1
                status = await _status(reader)
                self.statuses[status] = self.statuses.get(status, 0) + 1
                self.slowest = max(self.slowest, loop.time() - began)
        finally:
            writer.close()
            await writer.wait_closed()


async def _status(reader: asyncio.StreamReader) -> str:
    head = await reader.readuntil(HEAD_END)
    await reader.readexactly(content_length(head))
    return head[9:12].decode()


@contextlib.asynccontextmanager
async def load(running: Platform, note: Note) -> AsyncIterator[Load]:
    """Requests flow until the block ends; all of them are answered."""
    made, stop = Load(running), asyncio.Event()
    began = time.monotonic()
    tasks = [asyncio.create_task(made.caller(number, stop)) for number in range(CALLERS)]
    await wait_until(lambda: made.statuses.get("200", 0) > RATE, "requests flow")
    try:
        yield made
        seen = made.sent
        await wait_until(lambda: made.sent > seen + RATE, "requests still flow")
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    note("requests_per_second", round(made.sent / (time.monotonic() - began)))
    note("slowest_request_ms", round(1000 * made.slowest))


async def both_hold_the_model(running: Platform) -> None:
    async with httpx.AsyncClient(base_url=running.url, headers={"x-api-key": running.key}) as http:

        async def both() -> bool:
            found = (await http.get("/v1/workers")).json()["workers"]
            return sum(bool(worker["ready"]) for worker in found) == 2

        await wait_until(both, "both workers hold the model", 30)


# nats-py leaves the sockets of refused logins to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.alone
async def test_a_revoked_worker_is_out_within_two_seconds_and_nobody_else_notices(
    running: Platform, tmp_path: Path, record_property: Note
) -> None:
    await both_hold_the_model(running)
    pid = running.pids["worker-2"]
    thief = Home(tmp_path / "stolen")
    shutil.copytree(running.home.keys, thief.keys)
    settings = Settings(nats_url=str(running.endpoints["nats"]))
    async with load(running, record_property) as flowing, connect(settings, thief, "worker-2", follow=False) as bus:
        revoking = asyncio.create_task(command(running, "identity", "revoke", "worker-2"))
        await wait_until(lambda: read_keyset(running.home).version == 2, "the keyset is signed")
        at = read_keyset(running.home).revoked[0].revoked_at / 1000
        await wait_until(lambda: _gone(pid), "the worker's process has ended", LIMIT_S)
        record_property("worker_gone_ms", round(1000 * (time.time() - at)))
        await wait_until(lambda: not bus.connected, "the thief of its login is thrown out", LIMIT_S)
        record_property("login_gone_ms", round(1000 * (time.time() - at)))
        assert time.time() - at < LIMIT_S
        assert (await revoking)["published"] is True
    assert set(flowing.statuses) == {"200"}, flowing.statuses
    with pytest.raises(ConfigError):
        async with connect(settings, thief, "worker-2", follow=False):
            pass
    assert "was revoked" in (running.home.logs / "worker-2.log").read_text()
    gc.collect()


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_gateway_and_worker_get_new_keys_while_requests_flow(running: Platform, record_property: Note) -> None:
    await both_hold_the_model(running)
    pids = running.pids
    async with load(running, record_property) as flowing:
        for name in ("worker-1", "gateway", "dispatcher", "modelstore"):
            made = await command(running, "identity", "rotate", name, "--grace", "600")
            assert made["kid"] == load_identity(running.home.identity(name)).kid.hex()
            assert made["published"] is True
        log = running.home.logs
        for name in ("worker-1", "gateway"):
            await wait_until(lambda name=name: "key_rotated" in (log / f"{name}.log").read_text(), f"{name} signs anew")
    assert set(flowing.statuses) == {"200"}, flowing.statuses
    rows = await command(running, "identity", "list")
    states = {(row["name"], row["state"]) for row in rows}
    assert {("gateway", "current"), ("gateway", "outgoing"), ("admin", "current")} <= states
    assert running.pids == pids


async def test_a_worker_is_added_to_a_running_platform_on_a_data_directory_of_its_own(
    running: Platform, tmp_path: Path
) -> None:
    made = await command(running, "identity", "add", "worker-3", "--role", "worker", "--out", str(tmp_path / "three"))
    assert made["out"] == str(tmp_path / "three")
    home = Home(tmp_path / "three")
    assert not (home.keys / "root.key").exists()
    settings = Settings(nats_url=str(running.endpoints["nats"]), home=str(home.root))
    async with connect(settings, home, "worker-3") as bus:
        assert bus.verifier.keyset.version == 2


def test_commands_say_what_they_did_and_what_is_wrong() -> None:
    with temporary_home(workers=1) as home:
        done = tether(home, "identity", "rotate", "worker-1")
        assert done.returncode == 0, done.stderr
        assert "no platform runs" in done.stderr
        rows = json.loads(tether(home, "identity", "list", "--json").stdout)
        assert [row["state"] for row in rows if row["name"] == "worker-1"] == ["outgoing", "current"]
        for words, reason in (
            (["add", "worker-1", "--role", "worker"], "exists"),
            (["add", "w.1", "--role", "worker"], "cannot be an identity's name"),
            (["add", "w1", "--role", "king"], "is not a role"),
            (["rotate", "nobody"], "identity list"),
            (["revoke", "nobody"], "identity list"),
        ):
            done = tether(home, "identity", *words)
            assert done.returncode == 1
            assert reason in done.stderr
            assert done.stderr.count("\n") == 1
            assert done.stdout == ""
        renewed = json.loads(tether(home, "identity", "renew", "--valid-days", "1", "--json").stdout)
        assert renewed["version"] == 3
        cache = home.cache("worker-1")
        cache.mkdir(parents=True)
        cache.chmod(0o777)
        refused = tether(home, "worker", "--nats", "nats://127.0.0.1:1", "--ops-port", "0")
        assert refused.returncode == 1
        assert f"chmod go-w {cache}" in refused.stderr
        home.identity("gateway").chmod(0o644)
        refused = tether(home, "gateway", "--nats", "nats://127.0.0.1:1")
        assert refused.returncode == 1
        assert f"chmod 600 {home.identity('gateway')}" in refused.stderr


def test_a_locked_root_key_away_from_home_is_needed_for_changes_only(tmp_path: Path) -> None:
    home, stick = Home(tmp_path / "home"), str(tmp_path / "stick" / "root.key")
    env = {"TETHER_ROOT_PASSPHRASE": "correct horse"}
    made = tether(home, "init", "--workers", "1", "--root-key", stick, "--passphrase", env=env)
    assert made.returncode == 0, made.stderr
    assert not home.root_key.exists()
    assert tether(home, "init", "--workers", "1").returncode == 0
    assert "restore the root key" in tether(home, "init", "--workers", "2").stderr
    locked = tether(home, "identity", "rotate", "gateway", "--root-key", stick)
    assert "TETHER_ROOT_PASSPHRASE" in locked.stderr
    done = tether(home, "identity", "rotate", "gateway", "--root-key", stick, env=env)
    assert done.returncode == 0, done.stderr


def test_no_service_is_handed_the_passphrase_of_the_root_key() -> None:
    env = {"TETHER_ROOT_PASSPHRASE": "correct horse"}
    with platform(workers=1, env=env) as started:
        assert is_locked(started.home.root_key.read_bytes())
        for name, pid in started.pids.items():
            if name != "up":
                assert "correct horse" not in psutil.Process(pid).environ().values(), name
