"""The order of jobs that cannot be joined, and who waits behind a long job.

Of two jobs that wait the one of higher priority runs first, but for what is at the workers already and for those of lower
priority that have waited too long. Nobody waits behind a long job while another worker is idle.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from chaos.platform import Platform
from chaos.report import arguments, check, finish, say, spread, stamp
from chaos.workload import body, square, turn_s

PRIORITIES = ("low", "normal", "high")
_AT_ONCE = 200
_OPEN = ("queued", "running")


class Jobs:
    """Jobs of a model that runs them one by one."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.turn_s = turn_s(platform, "one")

    def job(self, number: int, seconds: float = 0.0, **fields: str) -> dict[str, Any]:
        return {"model": "one", **body(number, seconds / self.turn_s), **fields}

    def submit(self, job: dict[str, Any]) -> str:
        answer = self.platform.http.post("/v1/jobs", json=job).raise_for_status()
        return str(answer.json()["id"])

    def submit_all(self, jobs: list[dict[str, Any]]) -> list[str]:
        answer = self.platform.http.post("/v1/jobs:batch", json={"jobs": jobs}).raise_for_status()
        return [job["id"] for job in answer.json()["jobs"]]

    def wait(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.platform.http.get(f"/v1/jobs/{job}", params={"wait": 50}).json()
        return found

    def ends(self, ids: list[str]) -> list[float]:
        """When each job ended."""
        found = []
        for start in range(0, len(ids), _AT_ONCE):
            query: dict[str, str | int] = {"ids": ",".join(ids[start : start + _AT_ONCE]), "wait": 50}
            jobs = self.platform.http.get("/v1/jobs", params=query).json()["jobs"]
            found += [stamp(job["finished_at"]) if job.get("finished_at") else float("inf") for job in jobs]
        return found


def order(jobs: Jobs, label: str, seed: int, each: int, *, batch: bool, most: float) -> None:
    """Submit jobs of all priorities in any order while the workers stand still, and see how they end."""
    platform = jobs.platform
    platform.pause(*platform.worker_names)
    time.sleep(0.3)
    priorities = [priority for priority in PRIORITIES for _ in range(each)]
    random.Random(seed).shuffle(priorities)
    wanted = [jobs.job(number, 0.02, priority=priority) for number, priority in enumerate(priorities)]
    ids = jobs.submit_all(wanted) if batch else [jobs.submit(job) for job in wanted]
    platform.resume(*platform.worker_names)
    began = time.time()
    ends: dict[str, list[float]] = {priority: [] for priority in PRIORITIES}
    for priority, end in zip(priorities, jobs.ends(ids), strict=True):
        ends[priority].append(end - began)
    say(f"{label}:", {priority: f"first {min(times):.2f} last {max(times):.2f} s" for priority, times in ends.items()})
    for higher, lower in (("high", "normal"), ("high", "low"), ("normal", "low")):
        pairs = [other < one for one in ends[higher] for other in ends[lower]]
        part = sum(pairs) / len(pairs)
        check(part <= most, f"{label}: of {part:.0%} of pairs the {lower} one ended before the {higher} one")


def beside_low(jobs: Jobs) -> None:
    """Jobs of high priority and callers, beside 20 s of work of low priority."""
    platform = jobs.platform
    for _ in range(2):
        last = jobs.submit_all([jobs.job(number, 0.05, priority="low") for number in range(200)])[-1]
    time.sleep(2)
    high, calls = [], []
    for number in range(10):
        began = time.monotonic()
        jobs.wait(jobs.submit(jobs.job(number, priority="high")))
        high.append(time.monotonic() - began)
        began = time.monotonic()
        platform.http.post("/v2/models/one/infer", json=body(number)).raise_for_status()
        calls.append(time.monotonic() - began)
    say("beside 400 jobs of low priority: high", spread(high), "callers", spread(calls))
    check(max(high) <= 2, f"a job of high priority took {max(high):.1f} s beside jobs of low priority of 0.05 s each")
    check(max(calls) <= 1, f"a caller waited for {max(calls):.1f} s beside jobs of low priority of 0.05 s each")
    while jobs.wait(last)["state"] in _OPEN:
        pass


def beside_long(jobs: Jobs, kind: str, rounds: int = 4) -> None:
    """Short ones beside a job of 5 s that keeps one of two workers busy."""
    http, waited = jobs.platform.http, []
    for _ in range(rounds):
        long = jobs.submit({**jobs.job(1, 5), "model": "sq"})
        time.sleep(0.5)
        for number in range(8):
            began = time.monotonic()
            if kind == "caller":
                http.post("/v2/models/sq/infer", json=body(number)).raise_for_status()
            else:
                jobs.wait(jobs.submit({**jobs.job(number), "model": "sq"}))
            waited.append(time.monotonic() - began)
        jobs.wait(long)
    late = sum(one > 1 for one in waited)
    say(f"{kind} beside one job of 5 s on one of two workers: {spread(waited)}, {late} over 1 s")
    check(not late, f"{late} of {len(waited)} {kind}s waited behind a long job while another worker was idle")


def main() -> None:
    given = arguments(__doc__, each=150, most_inverted=0.05)
    with Platform(Path(given.folder) / "priorities", given.port) as platform:
        platform.push("one", square(), max_batch_size=1)
        platform.push("sq", square())
        jobs = Jobs(platform)
        order(jobs, "single submissions", given.seed, given.each, batch=False, most=given.most_inverted)
        order(jobs, "one batch", given.seed, given.each, batch=True, most=given.most_inverted)
        beside_low(jobs)
        for kind in ("caller", "job"):
            beside_long(jobs, kind)
    finish()


if __name__ == "__main__":
    main()
