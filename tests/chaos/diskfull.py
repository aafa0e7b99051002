"""The data directory on a small tmpfs that fills with jobs; room is made again.

Nothing acknowledged is lost. While it is full, refusals and readiness name the disk; afterwards everything works within
``back_s`` by itself.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from chaos.history import FINAL
from chaos.platform import Platform, end_all, lives
from chaos.report import arguments, check, counted, fail, finish, need, run, say
from chaos.workload import add_constant, body, square, widest

WIDTH = 250_000
_BALLAST_MB = 60
_MOST_JOBS = 1500
_FILL_S = 150.0


@contextmanager
def small_disk(mount: Path, size_mb: int) -> Iterator[Path]:
    mount.mkdir(parents=True, exist_ok=True)
    run("umount", "-l", str(mount), ok=False)
    run("mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(mount))
    try:
        yield mount
    finally:
        end_all(mount)
        time.sleep(0.5)
        run("umount", "-l", str(mount), ok=False)


def free_mb(path: Path) -> int:
    found = os.statvfs(path)
    return round(found.f_bavail * found.f_frsize / 1e6)


class Filling:
    """A platform on the small disk, and the large jobs that it acknowledged."""

    def __init__(self, platform: Platform, disk: Path) -> None:
        self.platform = platform
        self.disk = disk
        self.jobs: dict[int, str] = {}
        self._zeros = ",0" * (WIDTH - 1)

    def fill(self) -> None:
        """Submit jobs with 1 MB of inputs until three are refused."""
        refusals: list[str] = []
        began = time.monotonic()
        for number in range(_MOST_JOBS):
            if len(refusals) == 3 or time.monotonic() - began > _FILL_S:
                break
            what = self._submit(number)
            if what:
                say(f"job {number} refused with {free_mb(self.disk)} MB free: {what}")
                refusals.append(what)
        say(f"{len(self.jobs)} jobs acknowledged, {free_mb(self.disk)} MB free")
        check(refusals, "the disk did not become full; choose a smaller one")
        unnamed = [what for what in refusals if "storage_full" not in what and "max_file_mb" not in what]
        check(not unnamed, f"a refusal does not say that storage is full: {unnamed[:1]}")

    def _submit(self, number: int) -> str:
        """Why it was refused; empty when it was not."""
        shape = f'"shape": [1, {WIDTH}], "datatype": "FP32", "data": [{number + 1}{self._zeros}]'
        content = f'{{"model": "wide", "inputs": [{{"name": "x", {shape}}}]}}'
        headers = {"Idempotency-Key": f"d{number}", "content-type": "application/json"}
        try:
            answer = self.platform.http.post("/v1/jobs", content=content, headers=headers)
        except httpx.HTTPError as error:
            return type(error).__name__
        if answer.status_code == 202:
            self.jobs[number] = answer.json()["id"]
            return ""
        return f"{answer.status_code} {answer.text[:200]}"

    def while_full(self) -> None:
        http = self.platform.http
        calls = counted(http.post("/v2/models/sq/infer", json=body(number)).status_code for number in range(10))
        say("while full: callers", calls)
        for what, answer in (
            ("push", http.post("/v1/models/m2/versions", content=add_constant(3))),
            ("key", http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]})),
        ):
            say(f"while full: {what} {answer.status_code} {answer.text[:160]}")
        ready = http.get("/readyz")
        say(f"while full: readyz {ready.status_code} {ready.text[:300]}")
        say("doctor:", [line for line in self.platform.cli("doctor").splitlines() if not line.startswith("ok")][:6])
        dead = [name for name, pid in self.platform.pids().items() if not lives(pid)]
        check(not dead, f"while full: processes ended: {dead}")

    def recover(self, within_s: float) -> None:
        """Wait until callers, jobs and pushes work again."""
        http = self.platform.http
        tries: dict[str, Callable[[], httpx.Response]] = {
            "caller": lambda: http.post("/v2/models/sq/infer", json=body(1), timeout=20),
            "job": lambda: http.post("/v1/jobs", json={"model": "sq", **body(2)}, timeout=20),
            "push": lambda: http.post("/v1/models/m3/versions", content=add_constant(4), timeout=20),
            "ready": lambda: http.get("/readyz", timeout=20),
        }
        began, back = time.monotonic(), dict[str, float]()
        while len(back) < len(tries) and time.monotonic() - began < within_s + 30:
            for what, ask in tries.items():
                if what not in back and works(ask):
                    back[what] = round(time.monotonic() - began, 1)
            time.sleep(0.3)
        say(f"room was made; works again after s: {back}")
        late = {what: back.get(what, "never") for what in tries if back.get(what, within_s + 1) > within_s}
        check(not late, f"after room was made these do not work within {within_s:g} s by themselves: {late}")

    def ended(self, within_s: float) -> dict[object, int]:
        """How the acknowledged jobs ended."""
        states, left, end = [], dict(self.jobs), time.monotonic() + within_s
        while left and time.monotonic() < end:
            for number, job in list(left.items()):
                answer = self.platform.http.get(f"/v1/jobs/{job}")
                if answer.status_code == 404 or (answer.is_success and answer.json()["state"] in FINAL):
                    del left[number]
                    states.append(state_of(answer, number))
            time.sleep(0.5)
        return counted([*states, *["open" for _ in left]])


def works(ask: Callable[[], httpx.Response]) -> bool:
    try:
        return ask().is_success
    except httpx.HTTPError:
        return False


def state_of(answer: httpx.Response, number: int) -> str:
    if answer.status_code == 404:
        return "lost"
    job = answer.json()
    if job["state"] == "succeeded" and abs(job["result"]["outputs"][0]["data"][0] - number - 1) > 0.5:
        return "wrong"
    return str(job["state"])


def attacked(platform: Platform, disk: Path, given: Namespace) -> None:
    ballast = disk / "ballast"
    filling = Filling(platform, disk)
    platform.push("sq", square())
    platform.push("wide", widest(WIDTH))
    if given.stop_workers:
        platform.pause(*platform.worker_names)
    filling.fill()
    platform.resume(*platform.worker_names)
    filling.while_full()
    time.sleep(5)
    ballast.unlink()
    filling.recover(given.back_s)
    ends = filling.ended(60)
    say("acknowledged jobs:", ends)
    if ends != {"succeeded": len(filling.jobs)}:
        fail(f"of {len(filling.jobs)} acknowledged jobs: {ends}")
        platform.down()
        platform.up()
        say("after a restart:", filling.ended(60))
    say("audit:", platform.audit(), "restarts", platform.endpoints["restarts"])


def main() -> None:
    given = arguments(__doc__, size_mb=300, max_file_mb=0, stop_workers=1, back_s=30.0)
    need("mount", root=True)
    settings = {"max_file_mb": given.max_file_mb} if given.max_file_mb else {}
    with small_disk(Path(given.folder) / "diskfull", given.size_mb) as disk:
        (disk / "ballast").write_bytes(b"\1" * (_BALLAST_MB << 20))
        with Platform(disk / "home", given.port, **settings) as platform:
            attacked(platform, disk, given)
    finish()


if __name__ == "__main__":
    main()
