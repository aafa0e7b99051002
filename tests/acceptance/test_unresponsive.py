"""Processes that live and do nothing: they are told of, and started again."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.platforms import Platform, platform

from tether.process.os_process import send

INPUTS = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@pytest.fixture(scope="module")
def running() -> Iterator[Platform]:
    with platform(workers=1, env={"TETHER_UNRESPONSIVE_S": "3"}) as started:
        push(started)
        yield started


def push(running: Platform) -> None:
    headers = {"x-api-key": running.key}
    pushed = httpx.post(f"{running.url}/v1/models/add/versions", content=models.add(), headers=headers, timeout=60)
    assert pushed.status_code == 201


def ask(running: Platform, method: str, path: str, body: object = None) -> int:
    """The status of an answer; 0 without one."""
    try:
        headers = {"x-api-key": running.key}
        return httpx.request(method, running.url + path, json=body, headers=headers, timeout=30).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("name", ["gateway", "worker-1", "dispatcher", "modelstore", "nats"])
async def test_a_process_that_answers_no_health_check_is_started_again(running: Platform, name: str) -> None:
    before, pid = running.endpoints["restarts"], running.pids[name]
    send(pid, signal.SIGSTOP)
    await wait_until(lambda: running.endpoints["restarts"][name] > before[name], f"{name} is started again", 40)
    await wait_until(running.ready, "everything is ready again", 40)
    (row,) = [row for row in running.status()["processes"] if row["name"] == name]
    assert "answered no health check" in row["restarted_because"]
    assert f"{name} was restarted: it answered no health check" in running.run("status").stdout
    await wait_until(lambda: ask(running, "POST", "/v2/models/add/infer", INPUTS) == 200, "inference goes on", 40)


async def test_a_model_is_ready_only_while_a_worker_says_that_it_answers() -> None:
    with platform(workers=1) as running:
        push(running)

        def ready() -> bool:
            return ask(running, "GET", "/v2/models/add/ready") == 200

        await wait_until(ready, "the worker holds it", 20)
        # no dispatcher is there to take the worker out of the route: the gateway hears by itself that it is silent
        send(running.pids["up"], signal.SIGSTOP)
        send(running.pids["dispatcher"], signal.SIGKILL)
        worker = running.pids["worker-1"]
        send(worker, signal.SIGSTOP)
        try:
            await wait_until(lambda: not ready(), "nobody answers for it", 10)
        finally:
            send(worker, signal.SIGCONT)
        await wait_until(ready, "the worker answers again, without a dispatcher", 10)
        assert ask(running, "POST", "/v2/models/add/infer", INPUTS) == 200
        send(running.pids["up"], signal.SIGCONT)
        await wait_until(running.ready, "the dispatcher is back", 40)
