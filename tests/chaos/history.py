"""Clients that note all they saw, and the check of what they were promised."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import httpx
from chaos.platform import Platform
from chaos.report import check, counted, fail, percentile, say
from chaos.workload import add_constant, body, right

from tether.domain.job import TERMINAL

FINAL = frozenset(state.value for state in TERMINAL)
_AT_ONCE = 150
_SUBMIT_S = 180.0
"""How long a submission is tried."""


class Call(NamedTuple):
    """A synchronous request: when it was sent and answered, and ``ok``, ``WRONG`` or its error."""

    began: float
    ended: float
    what: str


class Accepted(NamedTuple):
    """A job that was acknowledged, when it was first sent and when it was acknowledged."""

    id: str
    sent: float
    acknowledged: float


def told(answer: httpx.Response) -> str:
    return str(answer.status_code) if answer.is_success else f"{answer.status_code} {answer.json().get('code')}"


class History:
    """Callers, submitters and pushers of one platform, and everything that they were told."""

    def __init__(self, platform: Platform, *, turns: float = 8000, prefix: str = "k", url: str = "") -> None:
        self.platform = platform
        self.url = url
        self.turns = turns
        self.prefix = prefix
        self.stop = False
        self.calls: list[Call] = []
        self.jobs: dict[int, Accepted] = {}
        self.refused: list[tuple[float, str]] = []
        """When a submission was not accepted, and why."""
        self.pushes: list[Call] = []
        self._next = 0

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url or self.platform.url,
            headers={"x-api-key": self.platform.key},
            timeout=45,
            limits=httpx.Limits(max_keepalive_connections=4),
            trust_env=False,
        )

    # clients

    async def call(self, seed: int, pause_s: float) -> None:
        """Ask again and again until told to stop."""
        rng = random.Random(seed)
        async with self.client() as http:
            while not self.stop:
                number, began = rng.randrange(10**6), time.time()
                what = await self._asked(http, number)
                self.calls.append(Call(began, time.time(), what))
                await asyncio.sleep(pause_s if what == "ok" else max(pause_s, 0.2))

    async def _asked(self, http: httpx.AsyncClient, number: int) -> str:
        try:
            answer = await http.post("/v2/models/sq/infer", json=body(number))
            if not answer.is_success:
                return told(answer)
            return "ok" if right(answer.json()["outputs"], number) else "WRONG"
        except (httpx.HTTPError, ValueError) as error:
            return type(error).__name__

    async def submit(self, pause_s: float) -> None:
        """Submit one job after another, each under a key until it is acknowledged."""
        async with self.client() as http:
            while not self.stop:
                number, self._next = self._next, self._next + 1
                await self._submitted(http, number)
                await asyncio.sleep(pause_s)

    async def _submitted(self, http: httpx.AsyncClient, number: int) -> None:
        began = time.time()
        while time.time() - began < _SUBMIT_S:
            try:
                answer = await self.send(http, number)
            except httpx.HTTPError as error:
                self.refused.append((time.time(), type(error).__name__))
            else:
                if answer.is_success:
                    self.jobs[number] = Accepted(answer.json()["id"], began, time.time())
                    return
                self.refused.append((time.time(), told(answer)))
                if answer.status_code not in (429, 500, 503):
                    fail(f"job {number} is refused: {answer.status_code} {answer.text[:150]}")
                    return
            await asyncio.sleep(0.2)
        fail(f"job {number} is not accepted within {_SUBMIT_S:g} s")

    async def send(self, http: httpx.AsyncClient, number: int, under: int | None = None) -> httpx.Response:
        """Submit job ``number`` once, under its own key or that of another number."""
        key = f"{self.prefix}{number if under is None else under}"
        content = {"model": "sq", **body(number, self.turns)}
        return await http.post("/v1/jobs", json=content, headers={"Idempotency-Key": key})

    async def push(self, pause_s: float) -> None:
        """Push one version after another of a model of its own."""
        count = 0
        async with self.client() as http:
            while not self.stop:
                count, began = count + 1, time.time()
                try:
                    what = told(await http.post("/v1/models/pushed/versions", content=add_constant(count)))
                except httpx.HTTPError as error:
                    what = type(error).__name__
                self.pushes.append(Call(began, time.time(), what))
                await asyncio.sleep(pause_s)

    # what they were promised

    async def read_all(self, within_s: float) -> dict[int, dict[str, Any]]:
        """How each acknowledged job ended; the state is OPEN when it did not in time, and LOST when nobody knows it."""
        ended: dict[int, dict[str, Any]] = {}
        left, end = dict(self.jobs), time.time() + within_s
        async with self.client() as http:
            while left and time.time() < end:
                numbers = list(left)[:_AT_ONCE]
                found = await self._read(http, [left[number].id for number in numbers])
                for number, job in zip(numbers, found, strict=False):
                    one = left.pop(number)
                    if job["state"] in FINAL or job["state"] == "LOST":
                        ended[number] = job
                    else:
                        left[number] = one
        return {**ended, **{number: {"state": "OPEN"} for number in left}}

    async def _read(self, http: httpx.AsyncClient, ids: list[str]) -> list[dict[str, Any]]:
        try:
            answer = await http.get("/v1/jobs", params={"ids": ",".join(ids), "wait": 5})
            if answer.is_success:
                return list(answer.json()["jobs"])
            if answer.status_code == 404:
                return [await self._read_one(http, job) for job in ids]
        except httpx.HTTPError as error:
            say("reading jobs:", type(error).__name__)
        await asyncio.sleep(0.5)
        return []

    async def _read_one(self, http: httpx.AsyncClient, job: str) -> dict[str, Any]:
        answer = await http.get(f"/v1/jobs/{job}")
        if answer.status_code == 404:
            fail(f"job {job} was acknowledged and is unknown: {answer.text[:120]}")
            return {"state": "LOST"}
        return answer.json() if answer.is_success else {"state": "queued"}

    async def check(self, label: str, *, within_s: float = 90.0) -> dict[int, dict[str, Any]]:
        """Every acknowledged job succeeded once, with the right answer, and its key still means it."""
        found = await self.read_all(within_s)
        states = counted(job["state"] for job in found.values())
        for number, job in found.items():
            if job["state"] == "succeeded" and not right(job["result"]["outputs"], number):
                fail(f"{label}: job {number} has a wrong answer")
        same = len(self.jobs) - len({job.id for job in self.jobs.values()})
        check(not same, f"{label}: {same} jobs share an id")
        others = [f"{number}:{job['state']}" for number, job in found.items() if job["state"] != "succeeded"]
        check(not others, f"{label}: {len(self.jobs)} acknowledged, {states}: {' '.join(others)[:400]}")
        again = await self._send_again(label, found)
        attempts = counted(job.get("attempts") for job in found.values())
        say(f"{label}: {len(self.jobs)} jobs {states}, attempts {attempts}, {again} keys sent again")
        return found

    async def _send_again(self, label: str, found: dict[int, dict[str, Any]]) -> int:
        chosen = random.Random(1).sample(list(self.jobs), min(300, len(self.jobs)))
        async with self.client() as http:
            for number in chosen:
                answer = await self.send(http, number)
                same = answer.is_success and answer.json()["id"] == self.jobs[number].id
                if not same or answer.json()["state"] != found[number]["state"]:
                    fail(f"{label}: key {number} sent again: {answer.status_code} {answer.text[:150]}")
            for number in chosen[-1:]:
                answer = await self.send(http, number + 1, under=number)
                check(answer.status_code == 409, f"{label}: another body under a used key: {answer.status_code}")
        return len(chosen)

    def check_list(self, label: str) -> None:
        """The API lists each acknowledged job once, and no others."""
        seen = listed_jobs(self.platform)
        ours = {job.id for job in self.jobs.values()}
        twice = sum(times != 1 for times in seen.values())
        extra, missing = len(seen.keys() - ours), len(ours - seen.keys())
        check(not (twice or extra or missing), f"{label}: listed: {extra} extra, {missing} missing, {twice} twice")

    def summary(self) -> str:
        slowest = max((call.ended - call.began for call in self.calls), default=0.0)
        high = percentile([call.ended - call.began for call in self.calls], 0.99)
        calls = counted(call.what for call in self.calls)
        refused = counted(why for _, why in self.refused)
        return (
            f"calls {calls}, slowest {slowest:.2f} s, p99 {high * 1e3:.0f} ms; {len(self.jobs)} jobs, refused {refused}"
        )

    def check_answers(self, label: str) -> None:
        """No caller got a wrong answer."""
        wrong = sum(call.what == "WRONG" for call in self.calls)
        check(not wrong, f"{label}: {wrong} callers got a wrong answer")


def listed_jobs(platform: Platform) -> dict[str, int]:
    """Every job that the API lists: its id, and how often."""
    seen: dict[str, int] = {}
    cursor = ""
    while True:
        page = platform.http.get("/v1/jobs", params={"limit": 200, **({"cursor": cursor} if cursor else {})}).json()
        for job in page["jobs"]:
            seen[job["id"]] = seen.get(job["id"], 0) + 1
        cursor = page.get("next_cursor", "")
        if not cursor:
            return seen


async def loaded(
    histories: Iterable[History],
    during: Callable[[], Any],
    *,
    callers: int = 3,
    submitters: int = 3,
    call_pause_s: float = 0.05,
    submit_pause_s: float = 0.05,
    seed: int = 1,
) -> None:
    """Let clients work while ``during`` runs, and stop them then."""
    many = list(histories)
    for history in many:
        history.stop = False
    tasks = [
        asyncio.create_task(one)
        for place, history in enumerate(many)
        for one in (
            *(history.call(seed * 1000 + place * 100 + number, call_pause_s) for number in range(callers)),
            *(history.submit(submit_pause_s) for _ in range(submitters)),
        )
    ]
    try:
        await during()
    finally:
        for history in many:
            history.stop = True
        await asyncio.gather(*tasks)
