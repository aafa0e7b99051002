"""How long waiting callers and jobs of high priority wait behind two batches of jobs of low priority of the same model.

A caller beside any batch waits for at most one run more.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from chaos.platform import Platform
from chaos.report import arguments, check, finish, say
from chaos.workload import body, square, turn_s

DELAYS_S = (0.0, 0.5, 1.0, 1.5, 2.0)


class Waited(NamedTuple):
    kind: str
    after_s: float
    seconds: float
    end: str


def ask(platform: Platform, kind: str, after_s: float) -> Waited:
    time.sleep(after_s)
    began = time.monotonic()
    with platform.client(timeout=120) as http:
        if kind == "caller":
            end = str(http.post("/v2/models/one/infer", json=body(1)).status_code)
        else:
            job = http.post("/v1/jobs", json={"model": "one", **body(1), "priority": "high"}).json()["id"]
            end = http.get(f"/v1/jobs/{job}", params={"wait": 60}).json()["state"]
    return Waited(kind, after_s, round(time.monotonic() - began, 2), end)


def main() -> None:
    given = arguments(__doc__, jobs=256, ms=150.0, most_s=3.0)
    with Platform(Path(given.folder) / "behind", given.port) as platform:
        platform.push("one", square(), max_batch_size=1)
        turns = given.ms / 1e3 / turn_s(platform, "one")
        batch = [{"model": "one", **body(number, turns), "priority": "low"} for number in range(given.jobs)]
        for _ in range(2):
            platform.http.post("/v1/jobs:batch", json={"jobs": batch}).raise_for_status()
        time.sleep(1)
        with ThreadPoolExecutor(2 * len(DELAYS_S)) as pool:
            asked = [pool.submit(ask, platform, kind, after) for kind in ("caller", "high") for after in DELAYS_S]
            waited = sorted(one.result() for one in asked)
        say(f"two batches of {given.jobs} jobs of {given.ms:g} ms, two workers:", *waited)
        for one in waited:
            check(one.end in ("200", "succeeded"), f"{one.kind} ended with {one.end}")
            check(one.seconds <= given.most_s, f"{one.kind} waited for {one.seconds} s behind jobs of low priority")
    finish()


if __name__ == "__main__":
    main()
