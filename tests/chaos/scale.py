"""Many models, many tenants and keys, many queued jobs on one machine: what each costs, and what a kill costs then."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from chaos.platform import Platform
from chaos.report import arguments, check, fail, finish, listed, percentile, say
from chaos.workload import add_constant, body, right, row, square

_CLIENTS = 4
_BATCH = 500
_BACK_S = 30.0
"""Within this a caller of a model is answered after a service was killed, whatever the size."""


def hot(platform: Platform, count: int = 300) -> str:
    """How long one caller waits."""
    times = []
    for number in range(count):
        began = time.monotonic()
        platform.http.post("/v2/models/sq/infer", json=body(number)).raise_for_status()
        times.append(time.monotonic() - began)
    return f"p50 {percentile(times, 0.5) * 1e3:.1f} ms p99 {percentile(times, 0.99) * 1e3:.1f} ms"


def look(platform: Platform, label: str) -> None:
    say(label, platform.usage(), "idle cpu %", platform.cpu(10), "callers", hot(platform))
    for words in (("status",), ("model", "list"), ("key", "list")):
        began = time.monotonic()
        platform.cli(*words)
        say(label, "tether", *words, f"{time.monotonic() - began:.1f} s")


def push_models(platform: Platform, start: int, stop: int) -> None:
    errors: list[str] = []

    def push(number: int) -> None:
        for _ in range(5):
            try:
                answer = platform.http.post(f"/v1/models/m{number:04}/versions", content=add_constant(number))
            except httpx.HTTPError as error:
                errors.append(type(error).__name__)
                continue
            if answer.is_success:
                return
            errors.append(f"{answer.status_code} {answer.text[:100]}")
        fail(f"model {number} cannot be pushed: {errors[-1]}")

    began = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(push, range(start, stop)))
    took = time.monotonic() - began
    say(f"{stop} models: {(stop - start) / took:.1f} pushes a second, errors {len(errors)} {errors[:2]}")
    began = time.monotonic()
    platform.ready(f"m{stop - 1:04}", 240)
    say(f"the last one is ready {time.monotonic() - began:.1f} s after its push")


def ask_models(platform: Platform, count: int) -> None:
    bad = 0
    for number in range(0, count, max(1, count // 40)):
        answer = platform.http.post(f"/v2/models/m{number:04}/infer", json=row(1, 2, 3, 4))
        bad += not answer.is_success or abs(answer.json()["outputs"][0]["data"][0] - 1 - number) > 1e-2
    check(not bad, f"{bad} of 40 models among {count} are not answered, or wrong")


def kill_one(platform: Platform, name: str, last: str) -> None:
    began = time.monotonic()
    platform.kill(name)
    time.sleep(0.3)
    while time.monotonic() - began < 90 and not answers(platform, last):
        time.sleep(0.1)
    took = time.monotonic() - began
    check(took <= _BACK_S, f"{name} killed: callers are answered after {took:.1f} s")
    say(f"{name} killed: callers are answered after {took:.1f} s")


def answers(platform: Platform, last: str) -> bool:
    try:
        asked = platform.http.post("/v2/models/sq/infer", json=body(1))
        return asked.is_success and platform.http.get(f"/v2/models/{last}/ready").is_success
    except httpx.HTTPError:
        return False


def models(platform: Platform, given: Namespace) -> None:
    done = 0
    for goal in map(int, listed(given.models)):
        push_models(platform, done, goal)
        done = goal
        ask_models(platform, goal)
        look(platform, f"{goal} models:")
    last = f"m{done - 1:04}"
    for name in ("dispatcher", "gateway", "nats"):
        kill_one(platform, name, last)
    began = time.monotonic()
    platform.down()
    down_s = time.monotonic() - began
    platform.up()
    say(f"down in {down_s:.1f} s, up in {platform.ready_s:.1f} s")
    platform.ready(last, 200)
    ask_models(platform, done)


def tenants(platform: Platform, given: Namespace) -> None:
    def make(number: int) -> str:
        platform.http.post("/v1/tenants", json={"name": f"t{number}"}).raise_for_status()
        asked = {"tenant": f"t{number}", "scopes": ["infer", "jobs", "models:read"]}
        return str(platform.http.post("/v1/keys", json=asked).raise_for_status().json()["key"])

    began = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        keys = list(pool.map(make, range(given.tenants)))
    say(f"{given.tenants} tenants and keys: {given.tenants / (time.monotonic() - began):.0f} a second")
    for key in keys[::25]:
        with platform.client(key=key) as http:
            status = http.post("/v2/models/sq/infer", json=body(1)).status_code
        check(status == 200, f"one of {given.tenants} keys is answered with {status}")
    look(platform, f"{given.tenants} tenants:")


def queued(platform: Platform, count: int) -> None:
    """Queue jobs while the workers stand still, kill the broker, and let them run."""
    platform.pause(*platform.worker_names)

    def batch(start: int) -> list[str]:
        content = {"jobs": [{"model": "sq", **body(number)} for number in range(start, start + _BATCH)]}
        for _ in range(60):
            answer = platform.http.post("/v1/jobs:batch", json=content, headers={"Idempotency-Key": f"{count}-{start}"})
            if answer.status_code == 202:
                return [job["id"] for job in answer.json()["jobs"]]
            time.sleep(0.5)
        raise RuntimeError(f"jobs are refused: {answer.status_code} {answer.text[:200]}")

    began = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        ids = [job for got in pool.map(batch, range(0, count, _BATCH)) for job in got]
    say(f"{count} queued at {count / (time.monotonic() - began):.0f} a second;", platform.usage())
    timed(f"{count} queued: the broker is back", lambda: back(platform, ids[0]))
    platform.resume(*platform.worker_names)
    began = time.monotonic()
    good = sum(
        job["state"] == "succeeded" and right(job["result"]["outputs"], start + place)
        for start in range(0, len(ids), 200)
        for place, job in enumerate(ended(platform, ids[start : start + 200]))
    )
    say(f"{count} queued: all ended and read after {time.monotonic() - began:.1f} s;", platform.usage())
    check(good == count == len(set(ids)), f"{count} queued: {good} have their answer, {len(set(ids))} ids")


def back(platform: Platform, job: str) -> None:
    platform.kill("nats")
    end = time.monotonic() + 120
    time.sleep(0.2)
    while time.monotonic() < end:
        try:
            if platform.http.get(f"/v1/jobs/{job}").is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    fail("the broker is not back within 120 s")


def timed(what: str, work: Callable[[], None]) -> None:
    began = time.monotonic()
    work()
    say(f"{what} after {time.monotonic() - began:.1f} s")


def ended(platform: Platform, ids: list[str]) -> list[dict[str, Any]]:
    """Jobs once all of them have ended."""
    end = time.monotonic() + 300
    while True:
        answer = platform.http.get("/v1/jobs", params={"ids": ",".join(ids), "wait": 50})
        found: list[dict[str, Any]] = answer.json()["jobs"]
        if time.monotonic() > end or all(job["state"] not in ("queued", "running") for job in found):
            return found


def jobs(platform: Platform, given: Namespace) -> None:
    for count in map(int, listed(given.jobs)):
        queued(platform, count)
    look(platform, "after the jobs:")


PARTS = {"models": models, "tenants": tenants, "jobs": jobs}


def main() -> None:
    given = arguments(__doc__, models="300,1000", tenants=1000, jobs="10000,100000", parts=",".join(PARTS))
    with Platform(Path(given.folder) / "scale", given.port) as platform:
        platform.push("sq", square())
        look(platform, "one model:")
        for part in listed(given.parts):
            PARTS[part](platform, given)
    finish()


if __name__ == "__main__":
    main()
