"""Kill any process at any moment: nothing that was accepted is lost, nothing ends twice, callers see answers."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.brokers.brokers import wait_until
from support.brokers.stored import stored
from support.platform.platforms import ROOT, Platform, platform

from tether.bus.session import connect
from tether.process.os_process import send
from tether.settings import Settings

DIGITS = ROOT / "examples" / "digits"
JOBS = 2000
BATCH = 50


@pytest.fixture(scope="module")
def running() -> Iterator[Platform]:
    with platform(workers=2) as started:
        push(started)
        yield started


def push(running: Platform) -> None:
    pushed = running.run("model", "push", "digits", str(DIGITS / "digits.onnx"))
    assert pushed.returncode == 0, pushed.stderr


@pytest.fixture(scope="module")
def images() -> Any:
    with np.load(DIGITS / "digits_holdout.npz", allow_pickle=False) as held_out:
        return held_out["images"].astype(np.float32).reshape(-1, 64)


def tensor(image: Any) -> dict[str, Any]:
    return {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": image.tolist()}


async def wait_ready(running: Platform) -> None:
    await wait_until(running.ready, "every process is ready", 30)
    async with client(running) as http:

        async def both() -> bool:
            try:
                found = (await http.get("/v1/workers")).json()
            except httpx.HTTPError:
                return False
            return sum(bool(worker["ready"]) for worker in found["workers"]) == 2

        await wait_until(both, "both workers hold the model", 30)


def client(running: Platform, connections: int = 32) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=running.url,
        headers={"x-api-key": running.key},
        timeout=60,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


async def submit(http: httpx.AsyncClient, number: int, images: Any) -> list[str]:
    """One batch under its own key, sent again until it is accepted, as a client would."""
    chosen = [images[(number * BATCH + offset) % len(images)] for offset in range(BATCH)]
    body = {"jobs": [{"model": "digits", "inputs": [tensor(image)]} for image in chosen]}
    for _ in range(200):
        try:
            answer = await http.post("/v1/jobs:batch", json=body, headers={"idempotency-key": f"chaos-{number}"})
        except httpx.TransportError:
            continue
        if answer.status_code == 202:
            return [job["id"] for job in answer.json()["jobs"]]
        assert answer.status_code in (429, 503), answer.text
        await asyncio.sleep(0.05)
    raise AssertionError("a batch was not accepted in 200 tries")


async def ends(http: httpx.AsyncClient, ids: list[str]) -> list[dict[str, Any]]:
    """How jobs ended, asked until all have."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        answer = await http.get("/v1/jobs", params={"ids": ",".join(ids), "wait": "10"})
        if answer.status_code == 200:
            jobs: list[dict[str, Any]] = answer.json()["jobs"]
            if all("finished_at" in job for job in jobs):
                return jobs
    raise AssertionError("jobs did not end in 90 s")


@pytest.mark.timeout(300)
async def test_two_thousand_jobs_survive_the_killing_of_worker_dispatcher_and_broker(
    running: Platform, images: Any
) -> None:
    await wait_ready(running)
    victims = {10: "worker-1", 20: "dispatcher", 30: "nats"}
    before = await results(running)
    async with client(running) as http:
        ids: list[str] = []
        for number in range(JOBS // BATCH):
            if number in victims:
                send(running.pids[victims[number]], signal.SIGKILL)
            ids += await submit(http, number, images)
        assert len(set(ids)) == JOBS
        jobs = [job for start in range(0, JOBS, 200) for job in await ends(http, ids[start : start + 200])]
        again = [job for start in range(0, JOBS, 200) for job in await ends(http, ids[start : start + 200])]
    assert Counter(job["state"] for job in jobs) == {"succeeded": JOBS}
    assert [job["id"] for job in jobs] == ids
    assert again == jobs
    await wait_ready(running)
    restarts = {row["name"]: row["restarts"] for row in running.status()["processes"]}
    assert all(restarts[name] >= 1 for name in victims.values())
    assert await results(running) - before == Counter(ids)
    # what was acknowledged while the broker died comes once more, and is acknowledged again
    await wait_until(lambda: messages(running)["TETHER_JOBS_0"] == 0, "no job is left in a lane", timeout_s=40)
    assert messages(running)["TETHER_DEAD"] == 0


async def results(running: Platform) -> Counter[str]:
    """How many results are stored of every job."""
    settings = Settings(home=str(running.home.root), nats_url=running.endpoints["nats"])
    async with connect(settings, running.home, "dispatcher", follow=False) as bus:
        found = await stored(bus, bus.names.results_stream)
        return Counter({subject.removeprefix(bus.names.result("")): count for subject, count in found.items()})


def messages(running: Platform) -> dict[str, int]:
    """Messages of every stream."""
    return {row["name"]: row["messages"] for row in running.status()["broker"]["streams"]}


async def timed(address: tuple[str, int], request: bytes) -> tuple[int, float]:
    """Status and seconds of one request on a connection of its own."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        await writer.drain()
        line = await reader.readline()
        return int(line.split()[1]), time.monotonic() - began
    finally:
        writer.close()
        await writer.wait_closed()


async def at_rest(tasks: list[asyncio.Task[tuple[int, float]]]) -> None:
    """Wait until all are done, or none has ended for a while."""
    while left := [task for task in tasks if not task.done()]:
        if not (await asyncio.wait(left, timeout=0.3, return_when=asyncio.FIRST_COMPLETED))[0]:
            return


@pytest.mark.alone
async def test_three_hundred_callers_see_no_error_when_a_worker_is_killed(running: Platform, images: Any) -> None:
    await wait_ready(running)
    url = httpx.URL(running.url)
    body = json.dumps({"inputs": [tensor(images[0])]}).encode()
    request = (
        f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: {url.host}\r\nx-api-key: {running.key}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    address = (url.host, url.port or 80)
    victim = running.pids["worker-2"]

    def callers() -> list[asyncio.Task[tuple[int, float]]]:
        return [asyncio.create_task(timed(address, request)) for _ in range(300)]

    waiting: list[asyncio.Task[tuple[int, float]]] = []
    while all(task.done() for task in waiting):  # callers share few messages, and the other worker may take them all
        assert len(waiting) <= 20 * 300, "the stopped worker was given nothing"
        send(victim, signal.SIGCONT)  # what it had asked for may have been over while it stood still
        assert (await timed(address, request))[0] == 200
        send(victim, signal.SIGSTOP)
        waiting += callers()
        await at_rest(waiting)
        assert (await timed(address, request))[0] == 200, "who comes later is answered by the other worker"
    more = callers()
    await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
    assert not all(task.done() for task in waiting), "the stopped worker holds requests when it is killed"
    send(victim, signal.SIGKILL)
    killed = time.monotonic()
    answers = await asyncio.gather(*waiting, *more)
    took = time.monotonic() - killed
    assert {status for status, _ in answers} == {200}
    assert took < 3.0, f"the last answer came {took:.2f} s after the kill"


async def test_inference_goes_on_while_the_dispatcher_is_dead(running: Platform, images: Any) -> None:
    await wait_ready(running)
    victim = running.pids["dispatcher"]
    send(victim, signal.SIGSTOP)
    try:
        async with client(running) as http:
            end = time.monotonic() + 5
            answered = 0
            while time.monotonic() < end:
                calls = [
                    http.post("/v2/models/digits/infer", json={"inputs": [tensor(image)]}) for image in images[:32]
                ]
                for answer in await asyncio.gather(*calls):
                    assert answer.status_code == 200, answer.text
                    answered += 1
        assert answered > 100
    finally:
        send(victim, signal.SIGCONT)


async def test_a_gateway_killed_after_accepting_finds_the_same_job_again(running: Platform, images: Any) -> None:
    await wait_ready(running)
    headers = {"idempotency-key": "kept"}
    body = {"model": "digits", "inputs": [tensor(images[0])]}
    async with client(running) as http:
        first = (await http.post("/v1/jobs", json=body, headers=headers)).json()["id"]
        send(running.pids["gateway"], signal.SIGKILL)
        await wait_ready(running)
    async with client(running) as http:
        again = await http.post("/v1/jobs", json=body, headers=headers)
        assert (again.status_code, again.json()["id"]) == (202, first)
        (job,) = await ends(http, [first])
        assert job["state"] == "succeeded"


async def test_a_worker_told_to_stop_leaves_nothing_to_its_redelivery(images: Any) -> None:
    """With an ack wait of half a minute, whatever it forgot would take half a minute."""
    with platform(workers=2, env={"TETHER_INFER_ACK_WAIT_S": "30"}) as running:
        push(running)
        await wait_ready(running)
        async with client(running) as http:
            url = "/v2/models/digits/infer"
            calls = [asyncio.create_task(http.post(url, json={"inputs": [tensor(image)]})) for image in images[:200]]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            send(running.pids["worker-1"], signal.SIGTERM)
            async with asyncio.timeout(20):
                answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {200}
        assert "Traceback" not in (running.home.logs / "worker-1.log").read_text()
