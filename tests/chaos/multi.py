"""Several gateways, several dispatchers, and a worker elsewhere that has nothing but its own deposited keys."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from chaos.history import History, loaded
from chaos.platform import Platform
from chaos.report import arguments, check, counted, fail, finish, listed, say
from chaos.workload import add_constant, body, row, square
from support.platform.platforms import command


@contextmanager
def processes(platform: Platform, *lines: Sequence[str], **env: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``tether`` commands beside the platform, until the block ends; each logs to ``extra-N.log`` of its home."""
    started: list[subprocess.Popen[bytes]] = []
    base = {**platform.env, "TETHER_NATS_URL": platform.endpoints["nats"], **env}
    try:
        for number, words in enumerate(lines):
            with (platform.home / f"extra-{words[0]}-{number}.log").open("w") as log:
                started.append(subprocess.Popen(command(*words), env=base, stdout=log, stderr=subprocess.STDOUT))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ready(url: str, within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if httpx.get(url + "/readyz", timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            time.sleep(0.1)
    return False


def asked(url: str, key: str) -> int:
    return httpx.post(url + "/v2/models/sq/infer", json=body(1), headers={"x-api-key": key}, timeout=30).status_code


async def under_load(platform: Platform, urls: Sequence[str], label: str, during: Any) -> None:
    histories = [
        History(platform, turns=1000, prefix=f"{label}-{number}-{time.time()}-", url=url)
        for number, url in enumerate(urls)
    ]
    await loaded(histories, during, callers=1, submitters=1)
    for number, history in enumerate(histories):
        say(f"{label}, gateway {number}:", history.summary())
        await history.check(f"{label}, gateway {number}", within_s=60)
        history.check_answers(label)
        refused = counted(call.what for call in history.calls if call.what != "ok")
        check(not refused, f"{label}: callers of gateway {number} got {refused}")


# several gateways


def one_key_everywhere(platform: Platform, urls: Sequence[str]) -> None:
    """Twelve submissions under one key at once, over all gateways, are one job."""
    bad = 0
    with ThreadPoolExecutor(12) as pool:
        for number in range(20):
            headers = {"x-api-key": platform.key, "Idempotency-Key": f"everywhere-{number}"}
            content = {"model": "sq", **body(number, 500)}
            sends = [
                pool.submit(httpx.post, urls[place % len(urls)] + "/v1/jobs", json=content, headers=headers, timeout=30)
                for place in range(12)
            ]
            answers = [send.result() for send in sends]
            ids = {answer.json()["id"] for answer in answers if answer.status_code == 202}
            bad += len(ids) != 1 or any(answer.status_code not in (202, 503) for answer in answers)
    check(not bad, f"{bad} of 20 keys on {len(urls)} gateways gave more than one job, or an error")


def limit_everywhere(platform: Platform, urls: Sequence[str], seconds: float = 8.0) -> None:
    """A key's rate holds for all gateways together."""
    limited = platform.http.post(
        "/v1/keys", json={"tenant": "default", "scopes": ["infer"], "rate": 30, "burst": 30}
    ).json()["key"]
    time.sleep(2)
    end = time.monotonic() + seconds

    def flood(url: str) -> int:
        count = 0
        while time.monotonic() < end:
            count += asked(url, limited) == 200
            time.sleep(0.005)
        return count

    with ThreadPoolExecutor(6) as pool:
        count = sum(pool.map(flood, [*urls, *urls]))
    allowed = 30 * seconds + 30
    say(f"a key with 30 a second and a burst of 30: {count} in {seconds:g} s, allowed {allowed:g}")
    check(count <= 1.15 * allowed, f"a key got {count} answers from {len(urls)} gateways, allowed are {allowed:g}")


def known_everywhere(platform: Platform, url: str) -> None:
    """A new key and its revocation reach another gateway within seconds."""
    made = platform.http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]}).json()
    for status, what in ((200, "known"), (401, "revoked")):
        began = time.monotonic()
        while asked(url, made["key"]) != status:
            if time.monotonic() - began > 10:
                fail(f"a key is not {what} at another gateway within 10 s")
                break
            time.sleep(0.02)
        say(f"a key is {what} at another gateway after {time.monotonic() - began:.2f} s")
        platform.http.delete(f"/v1/keys/{made['id']}")


async def gateways(platform: Platform, given: Namespace) -> None:
    ports = (given.port + 1, given.port + 2)
    urls = [platform.url, *(f"http://127.0.0.1:{port}" for port in ports)]
    lines = [("gateway", "--http", f"127.0.0.1:{port}") for port in ports]
    with processes(platform, *lines) as extra:
        if not_ready := [url for url in urls if not ready(url)]:
            fail(f"gateways that are not ready: {not_ready}: {tail(platform, 'extra-gateway-0.log')}")
            return
        await under_load(platform, urls, "three gateways", partial(asyncio.sleep, 15))
        await asyncio.to_thread(one_key_everywhere, platform, urls)
        await asyncio.to_thread(limit_everywhere, platform, urls)

        async def kill() -> None:
            await asyncio.sleep(3)
            extra[0].kill()
            await asyncio.sleep(8)

        await under_load(platform, [urls[0], urls[2]], "one of three gateways killed", kill)
        await asyncio.to_thread(known_everywhere, platform, urls[2])


# several dispatchers


async def dispatchers(platform: Platform, _: Namespace) -> None:
    with processes(platform, ("dispatcher",), ("dispatcher",)) as extra:
        await asyncio.sleep(5)
        ended = [process.poll() for process in extra if process.poll() is not None]
        check(not ended, f"further dispatchers ended with {ended}")

        async def stir() -> None:
            for number in range(6):
                await asyncio.to_thread(platform.push, f"d{number}", add_constant(number))
            for name, settle_s in (("worker-1", 6), ("dispatcher", 4), ("worker-2", 8)):
                platform.kill(name)
                await asyncio.sleep(settle_s)

        history = History(platform, turns=1000, prefix=f"d-{time.time()}-")
        await loaded([history], stir, callers=1, submitters=1)
        say("three dispatchers:", history.summary())
        await history.check("three dispatchers", within_s=60)
        history.check_answers("three dispatchers")
        statuses = [
            platform.http.post(f"/v2/models/d{number}/infer", json=row(1, 1, 1, 1)).status_code for number in range(6)
        ]
        check(statuses == [200] * 6, f"models that were pushed beside three dispatchers are answered with {statuses}")


# a worker elsewhere


def deposited(platform: Platform, name: str, folder: Path) -> None:
    """Make an identity whose files are in ``folder``, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    words = ("identity", "add", name, "--role", "worker", "--out", str(folder), "--data-dir", str(platform.home))
    said = platform.cli(*words)
    others = [path.name for path in folder.rglob("*") if "root.key" in path.name or "gateway" in path.name]
    check((folder / "keys").is_dir() and not others, f"deposited keys: {others or said[-300:]}")


def far_worker(folder: Path, name: str) -> tuple[str, ...]:
    return ("worker", "--data-dir", str(folder), "--name", name, "--ops-port", "0")


def listed_worker(platform: Platform, name: str) -> dict[str, Any]:
    """What the platform says of a worker; empty when it does not know it."""
    workers = platform.http.get("/v1/workers").json()["workers"]
    return next((worker for worker in workers if worker["name"] == name), {})


def joined(platform: Platform, name: str, within_s: float) -> bool:
    """Whether a worker holds models before its time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if listed_worker(platform, name).get("ready"):
            return True
        time.sleep(0.1)
    return False


async def elsewhere(platform: Platform, given: Namespace) -> None:
    folder, name = Path(given.folder) / "elsewhere", "far-1"
    deposited(platform, name, folder)
    with processes(platform, far_worker(folder, name), TETHER_HOME=str(folder)) as (worker,):
        if not joined(platform, name, 25):
            fail("a worker with its deposited keys does not join: " + tail(platform, "extra-worker-0.log"))
            return
        platform.pause(*platform.worker_names)
        await asyncio.sleep(4)
        statuses = [platform.http.post("/v2/models/sq/infer", json=body(number)).status_code for number in range(20)]
        platform.resume(*platform.worker_names)
        check(statuses == [200] * 20, f"callers of the worker elsewhere get {counted(statuses)}")
        worker.terminate()
        status = await asyncio.to_thread(worker.wait, 20)
        check(status == 0, f"the worker elsewhere ended with {status} at SIGTERM")


def tail(platform: Platform, log: str) -> str:
    return (platform.home / log).read_text()[-400:]


PARTS = {"gateways": gateways, "dispatchers": dispatchers, "elsewhere": elsewhere}


async def attacked(platform: Platform, given: Namespace) -> None:
    for part in listed(given.parts):
        await PARTS[part](platform, given)


def main() -> None:
    given = arguments(__doc__, parts=",".join(PARTS))
    with Platform(Path(given.folder) / "multi", given.port) as platform:
        platform.push("sq", square())
        asyncio.run(attacked(platform, given))
    finish()


if __name__ == "__main__":
    main()
