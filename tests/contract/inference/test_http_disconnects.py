"""Clients that leave before their answer is there: nothing is run for them, and what they held is free at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from support.http.served import Served, until
from support.models import bundles

from tether import AsyncClient, Client
from tether.domain import api_key
from tether.process import metrics

CODE = """
import time
from pathlib import Path
import numpy as np


class Model:
    runs = 0

    def load(self, directory):
        self.gate = Path((directory / "data" / "bias.txt").read_text())

    def predict(self, inputs):
        Model.runs += 1
        while not self.gate.exists():
            time.sleep(0.005)
        return {"y": np.full_like(inputs["x"], Model.runs)}
"""
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}


@dataclass
class Slow:
    """A model that runs one job after another, each for as long as its gate is closed, and answers with how many it ran."""

    served: Served
    name: str
    gate: Path

    @property
    def infer(self) -> str:
        return f"/v2/models/{self.name}/infer"

    def ask(self) -> float:
        with self.served.client() as http:
            answer = http.post(self.infer, json=BODY)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["outputs"][0]["data"][0])

    def asked(self) -> Future[float]:
        """A caller that stays."""
        found: Future[float] = Future()
        threading.Thread(target=lambda: found.set_result(self.ask())).start()
        return found

    def begin(self) -> tuple[float, Future[float]]:
        """Close the gate and have one caller's job run before it; how many ran before, and that caller's answer."""
        before = self.ask()
        self.gate.unlink()
        first = self.asked()
        until(lambda: self.running == 1, "the first job runs")
        return before, first

    @property
    def running(self) -> int:
        return sum(worker.holder.running() for worker in self.served.services.workers)

    @property
    def held(self) -> int:
        return self.served.services.gateway.held(self.name)

    def holds(self, count: int) -> None:
        until(lambda: self.held == count, f"the gateway holds {count} requests")

    def left(self, in_lane: float) -> None:
        """All but the first caller have left, and the worker knows of those that were sent since the metric was ``in_lane``."""
        self.holds(1)
        (holder,) = [worker.holder for worker in self.served.services.workers]
        (lane,) = [held.instance._withdrawn for ref, held in holder._held.items() if ref.model == self.name]
        until(lambda: len(lane._until) == withdrawn("lane") - in_lane, "the worker knows what was withdrawn")


@pytest.fixture
def slow(served: Served, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Slow]:
    gate = tmp_path / "gate"
    gate.touch()
    name = f"slow-{abs(hash(request.node.name)) % 10**9}"
    folder = bundles.write(tmp_path / "model", code=CODE, maxBatchSize=0)
    (folder / "data" / "bias.txt").write_text(str(gate))
    with Client(served.url, served.key) as client:
        client.push(name, folder)
    with served.client() as http:
        until(lambda: http.get(f"/v2/models/{name}/ready").status_code == 200, f"{name} is ready")
    try:
        yield Slow(served, name, gate)
    finally:
        gate.touch()


def limited_key(served: Served, concurrency: int) -> tuple[str, str]:
    """A key that may have so many requests open: its text and its id."""
    text = api_key.new_key_text()
    record = api_key.stored_key(text, tenant="default", scopes=api_key.SCOPES, name="limited", created_at=time.time())
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(record, concurrency=concurrency)))
    return text, record.id


def sent(served: Served, method: str, path: str, body: object | None = None, key: str = "") -> socket.socket:
    """A request on a connection of its own, whose answer nobody has read yet."""
    url = httpx.URL(served.url)
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key or served.key}\r\ncontent-length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((url.host, url.port or 80), timeout=20)
    connection.sendall(head.encode() + content)
    return connection


def withdrawn(where: str) -> float:
    return float(metrics.INFER_WITHDRAWN.labels(where)._value.get())


def dropped(name: str) -> float:
    return float(metrics.JOBS_FINISHED.labels(name, "cancelled")._value.get())


def test_requests_whose_clients_left_are_not_run_and_hold_nothing(slow: Slow) -> None:
    key, key_id = limited_key(slow.served, 40)
    before, first = slow.begin()
    in_gateway, in_lane = withdrawn("gateway"), withdrawn("lane")
    callers = [sent(slow.served, "POST", slow.infer, BODY, key) for _ in range(40)]
    slow.holds(41)
    with slow.served.client() as http:
        assert http.post(slow.infer, json=BODY, headers={"x-api-key": key}).status_code == 429
    for caller in callers:
        caller.close()
    slow.left(in_lane)
    limits = slow.served.services.gateway.limits
    until(lambda: limits.open_requests(key_id) == 0, "the key has no request open")
    assert withdrawn("gateway") + withdrawn("lane") == in_gateway + in_lane + 40
    assert withdrawn("lane") > in_lane
    slow.gate.touch()
    assert first.result(20) == before + 1
    assert slow.ask() == before + 2
    assert dropped(slow.name) == withdrawn("lane") - in_lane
    assert slow.served.services.gateway.inflight == 0


def test_requests_whose_time_is_over_are_not_run_and_hold_nothing(slow: Slow) -> None:
    key, key_id = limited_key(slow.served, 20)
    before, first = slow.begin()
    in_lane = withdrawn("lane")
    body = {**BODY, "parameters": {"timeout": 300_000}}
    callers = [sent(slow.served, "POST", slow.infer, body, key) for _ in range(20)]
    for caller in callers:
        assert caller.recv(4096).startswith(b"HTTP/1.1 504")
        caller.close()
    slow.left(in_lane)
    assert slow.served.services.gateway.limits.open_requests(key_id) == 0
    slow.gate.touch()
    assert first.result(20) == before + 1
    assert slow.ask() == before + 2


@pytest.mark.parametrize("way", ["close", "reset", "half"])
@pytest.mark.parametrize("route", ["/v2", "/v1/inference"])
def test_closing_resetting_and_ending_the_sending_side_are_all_leaving(slow: Slow, way: str, route: str) -> None:
    """HTTP/1.1 has no word for it: a client that ends its side alone looks like one that closed."""
    before, first = slow.begin()
    in_lane = withdrawn("lane")
    path, body = (slow.infer, BODY) if route == "/v2" else (route, {"modelId": slow.name, "inputData": [[1, 1, 1, 1]]})
    caller = sent(slow.served, "POST", path, body)
    slow.holds(2)
    if way == "reset":
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if way == "half":
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(1) == b""
    caller.close()
    slow.left(in_lane)
    slow.gate.touch()
    assert first.result(20) == before + 1
    assert slow.ask() == before + 2


def test_a_cancelled_call_of_the_sdk_takes_its_request_back(slow: Slow) -> None:
    before, first = slow.begin()
    in_lane = withdrawn("lane")

    async def leave() -> None:
        async with AsyncClient(slow.served.url, slow.served.key) as client:
            call = asyncio.create_task(client.infer(slow.name, {"x": np.ones((1, 4), np.float32)}))
            while slow.held < 2:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(leave())
    slow.left(in_lane)
    slow.gate.touch()
    assert first.result(20) == before + 1
    assert slow.ask() == before + 2


def test_a_request_that_others_wait_for_too_is_run_until_the_last_of_them_has_left(slow: Slow) -> None:
    before, first = slow.begin()
    in_lane = withdrawn("lane")
    with slow.served.client() as http:
        path = f"/v1/models/{slow.name}/config"
        config = http.get(path).json()
        changed = http.patch(path, json={"cache_ttl_s": 60}, headers={"if-match": str(config["revision"])})
        assert changed.status_code == 200, changed.text
    other = {"inputs": [{**BODY["inputs"][0], "data": [2, 2, 2, 2]}]}
    plans = slow.served.services.gateway.features.plans
    until(lambda: slow.name in plans, "the model has a cache")
    kept = slow.served.services.gateway.features.kept
    leader = sent(slow.served, "POST", slow.infer, other)
    slow.holds(2)
    followers = [sent(slow.served, "POST", slow.infer, other) for _ in range(2)]
    until(lambda: kept.following == 2, "two wait for the same answer")
    leader.close()
    followers[0].close()
    until(lambda: kept.following == 1, "one of them left")
    assert slow.held == 2
    followers[1].close()
    slow.left(in_lane)
    slow.gate.touch()
    assert first.result(20) == before + 1
    assert kept.following == 0


def test_who_waits_for_a_job_and_leaves_holds_nothing(slow: Slow) -> None:
    key, key_id = limited_key(slow.served, 5)
    slow.gate.unlink()
    with slow.served.client() as http:
        job = http.post("/v1/jobs", json={"model": slow.name, **BODY}).json()["id"]
    limits = slow.served.services.gateway.limits
    waiting = [
        sent(slow.served, "GET", path, key=key) for path in (f"/v1/jobs/{job}?wait=50", f"/v1/jobs?ids={job}&wait=50")
    ]
    until(lambda: limits.open_requests(key_id) == 2, "two wait for the job")
    for caller in waiting:
        caller.close()
    until(lambda: limits.open_requests(key_id) == 0, "the key has no request open")
    slow.gate.touch()
    with slow.served.client() as http:
        assert http.get(f"/v1/jobs/{job}", params={"wait": 20}).json()["state"] == "succeeded"
