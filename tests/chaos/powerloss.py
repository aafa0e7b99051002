"""What a power cut leaves: the data directory is an ext4 on a loop device, whose backing file is copied in the middle of load.

The copy has what the kernel had been made to write and nothing else; the platform is started on it. With ``durable`` every
acknowledged job and key and every end that a client saw must be there, with ``fast`` those that were acknowledged more than
``most_lost_s`` before the cut. Every job that is accepted afterwards is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Self

import httpx
from chaos.history import FINAL, Accepted, History
from chaos.platform import Platform, end_all, processes_below
from chaos.report import arguments, check, fail, finish, need, run, say
from chaos.workload import body, right, square

_END_S = 15.0
"""How long jobs may take to end after the restart."""
_FRESH = 40


class Disk:
    """A file system in a file. ``home`` is on it."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.image, self.mount = folder / "disk.img", folder / "disk"
        self._size_mb = size_mb

    @property
    def home(self) -> Path:
        return self.mount / "home"

    def __enter__(self) -> Self:
        run("umount", "-l", str(self.mount), ok=False)
        self.mount.mkdir(parents=True, exist_ok=True)
        self.image.unlink(missing_ok=True)
        run("truncate", "-s", f"{self._size_mb}M", str(self.image))
        run("mkfs.ext4", "-q", str(self.image))
        run("mount", "-o", "loop", str(self.image), str(self.mount))
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self.mount)
        time.sleep(0.5)
        run("umount", "-l", str(self.mount), ok=False)
        for path in self.image.parent.glob("disk.img*"):
            path.unlink()

    def copy(self) -> None:
        """Keep what is in the backing file now. The kernel may write meanwhile: two equal copies are one moment."""
        first, second = f"{self.image}.cut", f"{self.image}.cut2"
        for _ in range(20):
            for path in (first, second):
                run("cp", "--sparse=always", str(self.image), path)
            if run("cmp", first, second, ok=False) == 0:
                return
        fail("no two equal copies in a row: this disk writes too much")

    def cut(self) -> None:
        """Go on with the copy."""
        run("umount", str(self.mount))
        time.sleep(0.3)
        Path(f"{self.image}.cut").replace(self.image)
        run("mount", "-o", "loop", str(self.image), str(self.mount))


class Seen:
    """What clients saw before a cut: ends of jobs, and keys that were made, with the time of each."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.ends: dict[int, str] = {}
        self.keys: dict[str, float] = {}

    async def look(self) -> None:
        async with self._history.client() as http:
            while not self._history.stop:
                numbers = list(self._history.jobs)[-60:]
                ids = ",".join(self._history.jobs[number].id for number in numbers)
                with contextlib.suppress(httpx.HTTPError, KeyError):
                    jobs = (await http.get("/v1/jobs", params={"ids": ids})).json()["jobs"] if ids else []
                    for number, job in zip(numbers, jobs, strict=True):
                        if job["state"] in FINAL:
                            self.ends.setdefault(number, job["finished_at"])
                await asyncio.sleep(0.1)

    async def make_keys(self) -> None:
        async with self._history.client() as http:
            while not self._history.stop:
                with contextlib.suppress(httpx.HTTPError):
                    made = await http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]})
                    if made.status_code == 201:
                        self.keys[made.json()["id"]] = time.time()
                await asyncio.sleep(0.2)


class Cuts:
    """One power cut after another on one disk."""

    def __init__(self, given: Namespace, disk: Disk) -> None:
        self.given = given
        self.disk = disk
        self.allowed_s = given.most_lost_s if given.durability == "fast" else 0.0
        self.platform = self._platform(keep=False).up()
        self.platform.push("sq", square())
        self.history = History(self.platform, turns=0)
        self.rng = random.Random(given.seed)

    def _platform(self, *, keep: bool) -> Platform:
        settings = {"durability": self.given.durability, "max_file_mb": 600}
        return Platform(self.disk.home, self.given.port, keep=keep, **settings)

    async def round(self, number: int) -> None:
        history, seen = self.history, Seen(self.history)
        history.stop = False
        work = [*(history.submit(0.005) for _ in range(6)), seen.look(), seen.make_keys()]
        tasks = [asyncio.create_task(one) for one in work]
        await asyncio.sleep(3 + 3 * self.rng.random())
        self.platform.pause("nats")
        cut, jobs, keys = time.time(), dict(history.jobs), dict(seen.keys)
        await asyncio.to_thread(self.disk.copy)
        history.stop = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        history.jobs = jobs
        await asyncio.to_thread(self._restart)
        await self._compare(number, cut, seen, keys)

    def _restart(self) -> None:
        key, old = self.platform.key, self.platform
        for process in list(processes_below(self.disk.mount)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        old.ended()
        time.sleep(1)
        self.disk.cut()
        self.platform = self._platform(keep=True)
        self.platform.key = key
        self.history.platform = self.platform.up()

    async def _compare(self, number: int, cut: float, seen: Seen, keys: dict[str, float]) -> None:
        fresh = await self._submit_fresh()
        gone, open_, again = await self._ended(number, seen)
        stuck = [job for job in fresh if self.platform.http.get(f"/v1/jobs/{job}").json()["state"] != "succeeded"]
        if stuck or open_:
            self._tell_lanes()
        check(not stuck, f"round {number}: {len(stuck)} of {_FRESH} jobs that were accepted after the cut are not run")
        known = {key["id"] for key in self.platform.http.get("/v1/keys").json()["keys"]}
        lost = {
            "jobs lost": [cut - job.acknowledged for job in gone.values()],
            "jobs never ended": [cut - job.acknowledged for job in open_.values()],
            "keys lost": [cut - made for key, made in keys.items() if key not in known],
        }
        for what, ages in lost.items():
            late = [age for age in ages if age > self.allowed_s]
            check(
                not late,
                f"round {number}: {len(late)} {what}, acknowledged up to {max(late, default=0):.2f} s before the cut",
            )
        durable = self.given.durability == "durable"
        check(not (again and durable), f"round {number}: {again} jobs ended a second time after the cut")
        oldest = {what: f"{len(ages)}, up to {max(ages, default=0):.2f} s before" for what, ages in lost.items()}
        say(
            f"round {number}: {len(self.history.jobs)} acknowledged, {oldest}, {again} ended twice, up in {self.platform.ready_s:.1f} s"
        )
        say("audit:", self.platform.audit())
        for place in (*gone, *open_):
            del self.history.jobs[place]

    async def _submit_fresh(self) -> list[str]:
        async with self.history.client() as http:
            answers = [await http.post("/v1/jobs", json={"model": "sq", **body(one)}) for one in range(_FRESH)]
        return [answer.json()["id"] for answer in answers]

    async def _ended(self, number: int, seen: Seen) -> tuple[dict[int, Accepted], dict[int, Accepted], int]:
        """Jobs that are unknown or ended as ``job_lost``, jobs that do not end, and how many ended another time than a client saw."""
        gone: dict[int, Accepted] = {}
        left, again, end = dict(self.history.jobs), 0, time.monotonic() + _END_S
        async with self.history.client() as http:
            while left and time.monotonic() < end:
                for place, job in list(left.items()):
                    answer = await http.get(f"/v1/jobs/{job.id}")
                    if _lost(answer):
                        gone[place] = left.pop(place)
                    elif answer.is_success and answer.json()["state"] in FINAL:
                        del left[place]
                        again += self._other_end(number, place, answer.json(), seen)
                await asyncio.sleep(0.2)
        return gone, left, again

    def _other_end(self, number: int, place: int, job: dict[str, Any], seen: Seen) -> bool:
        if job["state"] != "succeeded" or not right(job["result"]["outputs"], place):
            fail(f"round {number}: job {place} {job['state']}, or a wrong answer")
        return place in seen.ends and job["finished_at"] != seen.ends[place]

    def _tell_lanes(self) -> None:
        for stream in self.platform.broker_streams():
            if "_JOBS_" in stream["name"]:
                say(stream["name"], {name: stream["state"][name] for name in ("messages", "first_seq", "last_seq")})
                for consumer in stream.get("consumer_detail", []):
                    say("  ", consumer["name"], consumer["delivered"], "pending", consumer["num_pending"])


def _lost(answer: httpx.Response) -> bool:
    """Whether a job is unknown, or its record outlived its message or result, which ends it as ``job_lost`` after half a minute."""
    if answer.is_success:
        return bool(answer.json().get("error", {}).get("code") == "job_lost")
    return answer.status_code == 404


async def attacked(given: Namespace, disk: Disk) -> None:
    cuts = await asyncio.to_thread(Cuts, given, disk)
    try:
        for number in range(given.rounds):
            await cuts.round(number)
    finally:
        await asyncio.to_thread(cuts.platform.down)


def main() -> None:
    given = arguments(__doc__, durability="durable", rounds=4, size_mb=700, most_lost_s=2.0)
    need("losetup", "mkfs.ext4", "mount", root=True)
    with Disk(Path(given.folder) / f"powerloss-{given.durability}", given.size_mb) as disk:
        asyncio.run(attacked(given, disk))
    finish()


if __name__ == "__main__":
    main()
