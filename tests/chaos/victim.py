"""A tenant that asks at a steady rate, and notes how long each answer took."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from chaos.asking import GONE, Answer, Asker
from chaos.report import percentile
from chaos.workload import add_constant, right, row

MODEL = "v-square"
JOB_EVERY_S = 2.0
PUSH_EVERY_S = 15.0
_JOB_WAIT_S = 60
_PUSH_WAIT_S = 90


class Asked(NamedTuple):
    """A request or job. ``at`` and ``late_s`` are on the monotonic clock: when it was due, and how much later it was sent."""

    at: float
    seconds: float
    late_s: float
    told: str


class Victim:
    """``rate`` requests a second, whether or not earlier ones were answered, and a durable job every two seconds."""

    def __init__(self, url: str, key: str, rate: float, seed: int) -> None:
        self.asker = Asker(url, key)
        self.rate = rate
        self._draw = random.Random(seed)
        self.calls: list[Asked] = []
        self.jobs: list[Asked] = []
        self.pushes: list[Asked] = []
        """Until a worker answers for what was pushed."""

    async def work(self, seconds: float) -> None:
        """Ask for so long, and wait for the last answers."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._jobs(seconds, group))
            group.create_task(self._pushes(seconds))
            began, count = time.monotonic(), int(seconds * self.rate)
            for number in range(count):
                due = began + (number + self._draw.random()) / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self._call(due))

    async def _call(self, due: float) -> None:
        number, late = self._draw.randrange(10**6), time.monotonic() - due
        answer = await self.asker.ask("POST", f"/v2/models/{MODEL}/infer", body(number))
        self.calls.append(Asked(due, answer.seconds, late, self._judged(answer, number)))

    @staticmethod
    def _judged(answer: Answer, number: int) -> str:
        if answer.status != 200:
            return "lost" if answer.status == GONE else answer.told
        return "ok" if right(answer.json()["outputs"], number) else "WRONG"

    async def _jobs(self, seconds: float, group: asyncio.TaskGroup) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            group.create_task(self._job())
            await asyncio.sleep(JOB_EVERY_S)

    async def _job(self) -> None:
        number, began = self._draw.randrange(10**6), time.monotonic()
        answer = await self.asker.ask("POST", "/v1/jobs", {"model": MODEL, **body(number)})
        told = answer.told
        if answer.status == 202:
            path = f"/v1/jobs/{answer.json()['id']}?wait={_JOB_WAIT_S}"
            answer = await self.asker.ask("GET", path)
            told = answer.json().get("state", answer.told) if answer.status == 200 else answer.told
            if told == "succeeded":
                told = "ok" if right(answer.json()["result"]["outputs"], number) else "WRONG"
        self.jobs.append(Asked(began, time.monotonic() - began, 0.0, told))

    async def _pushes(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began, told = time.monotonic(), await self._push(len(self.pushes))
            self.pushes.append(Asked(began, time.monotonic() - began, 0.0, told))
            await asyncio.sleep(max(0.0, began + PUSH_EVERY_S - time.monotonic()))

    async def _push(self, number: int) -> str:
        answer = await self.asker.ask("POST", "/v1/models/v-pushed/versions", add_constant(number))
        if answer.status != 201:
            return answer.told
        path = f"/v2/models/v-pushed/versions/{answer.json()['version']}/ready"
        end = time.monotonic() + _PUSH_WAIT_S
        while (await self.asker.ask("GET", path)).status != 200:
            if time.monotonic() > end:
                return f"not ready within {_PUSH_WAIT_S} s"
            await asyncio.sleep(0.1)
        return "ok"


def body(number: int) -> dict[str, object]:
    return row(float(number % 1000), float(number // 1000 % 1000), 7.0, 0.0)


class Figures(NamedTuple):
    """Of some requests; times in milliseconds. ``late``: how much later than planned the client itself sent, p99."""

    asked: int
    p50: float
    p99: float
    most: float
    late: float
    errors: dict[str, int]

    def __str__(self) -> str:
        words = f"n={self.asked} p50 {self.p50:.1f} p99 {self.p99:.1f} max {self.most:.1f} ms"
        return f"{words}, sent late by {self.late:.1f} ms (p99), errors {self.errors}"


def figures(asked: Sequence[Asked]) -> Figures:
    ok = [one.seconds * 1e3 for one in asked if one.told == "ok"]
    return Figures(
        len(asked),
        percentile(ok, 0.5),
        percentile(ok, 0.99),
        max(ok, default=float("nan")),
        percentile([one.late_s * 1e3 for one in asked], 0.99),
        dict(Counter(one.told for one in asked if one.told != "ok")),
    )
