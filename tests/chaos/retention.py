"""How many jobs fit before submissions are refused although every queue is empty, and what a refusal says and does.

A platform of ``max_file_mb`` takes at least ``least`` short jobs one after another. What is refused is not run, and the refusal
names the bound and its setting.
"""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from chaos.history import FINAL, listed_jobs
from chaos.platform import Platform
from chaos.report import arguments, check, finish, say
from chaos.workload import body, square

BATCH = 500


def fill(platform: Platform, most: int) -> tuple[int, httpx.Response]:
    """Submit batches, each when the one before has ended, until one is refused; how many jobs were accepted."""
    accepted = 0
    while True:
        jobs = [{"model": "sq", **body(number)} for number in range(BATCH)]
        answer = platform.http.post("/v1/jobs:batch", json={"jobs": jobs})
        if answer.status_code != 202:
            return accepted, answer
        accepted += BATCH
        last = answer.json()["jobs"][-1]["id"]
        while platform.http.get(f"/v1/jobs/{last}", params={"wait": 30}).json()["state"] not in FINAL:
            pass
        if accepted >= most:
            return accepted, answer


def main() -> None:
    given = arguments(__doc__, max_file_mb=256, most=60_000, least=60_000)
    with Platform(Path(given.folder) / "retention", given.port, max_file_mb=given.max_file_mb) as platform:
        platform.push("sq", square())
        before = platform.usage()["nats"][0]
        accepted, answer = fill(platform, given.most)
        say(
            f"max_file_mb={given.max_file_mb}: {accepted} jobs, all ended; then {answer.status_code} {answer.text[:250]}"
        )
        check(accepted >= given.least, f"refused after {accepted} jobs with every queue empty: {answer.text[:200]}")
        grown = (platform.usage()["nats"][0] - before) / max(accepted, 1) * 1000
        say(f"the broker's memory grew by {grown:.2f} MB for each 1,000 jobs")
        if answer.status_code != 202:
            check("max_file_mb" in answer.text, f"the refusal names no setting: {answer.text[:200]}")
            time.sleep(2)
            kept = len(listed_jobs(platform))
            check(kept <= accepted, f"{kept} jobs are listed, {accepted} were accepted: refused ones were queued")
        calls = [platform.http.post("/v2/models/sq/infer", json=body(1)).status_code for _ in range(5)]
        check(calls == [200] * 5, f"callers are answered with {calls}")
    finish()


if __name__ == "__main__":
    main()
