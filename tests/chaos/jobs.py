"""Jobs of one platform, by the words of the HTTP interface: what the scripts about meaning share."""

from __future__ import annotations

import time
from typing import Any

import httpx
from chaos.history import FINAL
from chaos.platform import Platform
from chaos.workload import body, turn_s

Job = dict[str, Any]


class Jobs:
    """Submits and looks."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.turn_s = turn_s(platform)

    def turns(self, seconds: float) -> float:
        return seconds / self.turn_s

    def submit(self, number: int, seconds: float = 0.0, *, key: str = "", **fields: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        content = {"model": "sq", **body(number, self.turns(seconds)), **fields}
        return self.platform.http.post("/v1/jobs", json=content, headers=headers)

    def accepted(self, number: int, seconds: float = 0.0, **fields: Any) -> str:
        """Submit a job that must be accepted; its id."""
        return str(self.submit(number, seconds, **fields).raise_for_status().json()["id"])

    def batch(self, jobs: list[Job], key: str = "") -> httpx.Response:
        return self.platform.http.post(
            "/v1/jobs:batch", json={"jobs": jobs}, headers={"Idempotency-Key": key} if key else {}
        )

    def get(self, job: str, wait: float = 0.0) -> Job:
        found: Job = self.platform.http.get(f"/v1/jobs/{job}", params={"wait": wait}).json()
        return found

    def until_ended(self, job: str, within_s: float = 60.0) -> Job:
        end = time.monotonic() + within_s
        found = self.get(job)
        while found.get("state") not in FINAL and time.monotonic() < end:
            time.sleep(0.05)
            found = self.get(job)
        return found

    def cancel(self, job: str) -> httpx.Response:
        return self.platform.http.delete(f"/v1/jobs/{job}")

    def stop_workers(self) -> None:
        self.platform.pause(*self.platform.worker_names)
        time.sleep(0.3)

    def let_workers_run(self) -> None:
        self.platform.resume(*self.platform.worker_names)

    def busiest_worker(self) -> float:
        """Percent of a core that the busiest worker takes."""
        used = self.platform.cpu(3)
        return max(used.get(name, 0.0) for name in self.platform.worker_names)


def code(found: Job) -> str:
    """Code of the error that a job ended with, or nothing."""
    return str((found.get("error") or {}).get("code", ""))
