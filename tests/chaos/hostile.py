"""A tenant that does everything at once that its key allows: a program that works until it is ended and then says what it got.

    python -m chaos.hostile URL --seed 1 --acts infer,jobs < KEY

Each act is a handful of tasks on connections of their own, all in one process. Most acts ask again as soon as they are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import uvloop
from chaos.asking import GONE, Answer, Asker
from chaos.report import listed
from chaos.workload import add_constant, row
from support.models import models

MODELS: dict[str, Callable[[], bytes]] = {
    "h-small": lambda: add_constant(3),
    "h-count": models.counting,
    "h-fill": models.filling,
    "h-wide": lambda: models.repeating(100_000),
    "h-gather": models.gather,
    "h-kernel": models.multiplying,
}
"""What it pushes before it begins."""

LONG_MS = 30 * 86400 * 1000
TRIPS = 300_000
"""Of a slow job: some hundred milliseconds."""
FOR_EVER = 1 << 40
SLOW_LOADS = 8
_REST_S = 0.2
"""After a request that was lost or refused: a client that asks without a pause measures its own processor."""


def vector(name: str, *data: int, datatype: str = "INT64", shape: list[int] | None = None) -> dict[str, Any]:
    """Inputs of a model that takes one tensor."""
    return {"inputs": [{"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": list(data)}]}


class Hostile:
    """Its clients, and what they were told, by act and answer."""

    def __init__(self, url: str, key: str, seed: int) -> None:
        self.asker = Asker(url, key)
        self.url = url
        self.draw = random.Random(seed)
        self.told: dict[str, Counter[str]] = {}
        self.jobs: list[str] = []
        self.pushed = 0

    def note(self, act: str, answer: Answer) -> Answer:
        self.told.setdefault(act, Counter())[answer.told] += 1
        return answer

    async def ask(self, act: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        answer = self.note(act, await self.asker.ask(method, path, body, **headers))
        if answer.status in (GONE, 401, 429, 503):
            await asyncio.sleep(_REST_S)
        return answer

    async def submit(self, act: str, jobs: list[dict[str, Any]], **headers: str) -> None:
        answer = await self.ask(act, "POST", "/v1/jobs:batch", {"jobs": jobs}, **headers)
        if answer.status == 202:
            self.jobs = (self.jobs + [job["id"] for job in answer.json()["jobs"]])[-5000:]

    async def prepare(self) -> None:
        """Push what it needs, and wait until that is held. Then let some models take as long to load as they may."""
        for name, content in MODELS.items():
            answer = await self.asker.ask("POST", f"/v1/models/{name}/versions", content())
            if answer.status not in (200, 201):
                raise RuntimeError(f"push of {name}: {answer.status} {answer.body[:300]!r}")
        for name in MODELS:
            while (await self.asker.ask("GET", f"/v2/models/{name}/ready")).status != 200:
                await asyncio.sleep(0.1)

    async def load_slowly(self) -> None:
        """Models whose warm-up does not end by itself."""
        for number in range(SLOW_LOADS):
            name = f"h-load-{number}"
            await self.ask(
                "slow_loads", "POST", f"/v1/models/{name}/versions", models.slow_when_long((1 << 40) + number)
            )
            change = {"warmup": [{"shapes": {"x": [200]}}], "instances": 1 + number % 2}
            await self.ask("slow_loads", "PATCH", f"/v1/models/{name}/config", change)

    # acts that ask for runs

    async def infer(self, act: str) -> None:
        await self.ask(act, "POST", "/v2/models/h-small/infer", row(1, 2, 3, 4))

    async def endless(self, act: str) -> None:
        await self.ask(act, "POST", "/v2/models/h-count/infer", vector("n", FOR_EVER))

    async def memory(self, act: str) -> None:
        side = self.draw.choice((4000, 12_000, 20_000))
        await self.ask(act, "POST", "/v2/models/h-fill/infer", vector("n", side, side))

    async def kernel(self, act: str) -> None:
        """One kernel of some seconds, which cannot be interrupted."""
        await self.ask(act, "POST", "/v2/models/h-kernel/infer", vector("n", 3000, 3000))

    async def large_answers(self, act: str) -> None:
        await self.ask(act, "POST", "/v2/models/h-wide/infer", row(1, 2, 3, 4))

    async def large_bodies(self, act: str) -> None:
        """A body near the limit, which is wrong at its end."""
        data = b"1.25," * 900_000
        body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[' + data + b"1]}]}"
        await self.ask(act, "POST", "/v2/models/h-small/infer", body)

    async def aborted(self, act: str) -> None:
        """Ask and leave."""
        body = vector("n", self.draw.choice((10, FOR_EVER)))
        with suppress(TimeoutError):
            async with asyncio.timeout(self.draw.uniform(0.0, 0.3)):
                await self.ask(act, "POST", "/v2/models/h-count/infer", body)

    # acts that ask for jobs

    async def singles(self, act: str) -> None:
        """Jobs one by one, half of them under keys that were used before."""
        number = self.draw.randrange(2000)
        headers = {"idempotency_key": f"h-{number}"} if number % 2 else {}
        await self.ask(act, "POST", "/v1/jobs", {"model": "h-small", **row(number, 2, 3, 4)}, **headers)

    async def slow_batches(self, act: str) -> None:
        one = {"model": "h-count", **vector("n", TRIPS), "deadline_ms": LONG_MS}
        await self.submit(act, [{**one, "priority": self.draw.choice(("high", "normal"))} for _ in range(200)])
        await asyncio.sleep(1)

    async def failing(self, act: str) -> None:
        one = {"model": "h-gather", **vector("x", 99, shape=[1, 1])}
        await self.submit(act, [one] * 200)
        await asyncio.sleep(0.5)

    async def huge_outputs(self, act: str) -> None:
        """1.6 MB each, never fetched."""
        await self.submit(act, [{"model": "h-wide", **row(1, 2, 3, 4)} for _ in range(20)])
        await asyncio.sleep(1)

    async def lists(self, act: str) -> None:
        page = await self.ask(act, "GET", "/v1/jobs?limit=1000")
        if cursor := page.json().get("next_cursor"):
            await self.ask(act, "GET", f"/v1/jobs?limit=1000&cursor={cursor}&state=failed")

    async def waits(self, act: str) -> None:
        if len(self.jobs) >= 100:
            ids = self.draw.sample(self.jobs, 100)
            await self.ask(act, "GET", f"/v1/jobs?ids={','.join(ids)}&wait=5")
        else:
            await asyncio.sleep(0.5)

    async def cancels(self, act: str) -> None:
        if self.jobs:
            await self.ask(act, "DELETE", f"/v1/jobs/{self.draw.choice(self.jobs)}")
        await asyncio.sleep(0.02)

    # acts about models

    async def pushes(self, act: str) -> None:
        """Push and delete again."""
        self.pushed += 1
        name = f"h-pushed-{self.pushed % 3}"
        answer = await self.ask(act, "POST", f"/v1/models/{name}/versions", add_constant(self.pushed))
        if answer.status == 201:
            version = answer.json()["version"]
            await self.ask(act, "DELETE", f"/v1/models/{name}/aliases/latest")
            await self.ask(act, "DELETE", f"/v1/models/{name}/versions/{version}")

    async def hanging_pushes(self, act: str) -> None:
        """A model of 400 bytes whose inspection does not end by itself."""
        self.pushed += 1
        await self.ask(act, "POST", "/v1/models/h-hang/versions", models.looping((1 << 60) + self.pushed))

    async def configs(self, act: str) -> None:
        """Another number of copies, which loads the model again."""
        change = {"instances": self.draw.randrange(1, 9)}
        await self.ask(act, "PATCH", "/v1/models/h-small/config", change)
        await asyncio.sleep(1)

    # acts that should be refused

    async def unknown_keys(self, act: str) -> None:
        key = f"tk_{self.draw.getrandbits(64):016x}_{self.draw.getrandbits(256):064x}"
        answer = await self.asker.ask("POST", "/v2/models/h-small/infer", row(1, 2, 3, 4), x_api_key=key)
        self.note(act, answer)

    async def unknown_models(self, act: str) -> None:
        self.note(
            act, await self.asker.ask("POST", f"/v2/models/no-{self.draw.getrandbits(40)}/infer", row(1, 2, 3, 4))
        )

    async def half_requests(self, act: str) -> None:
        """Connections that send half of a request and stay."""
        transport = (await self.asker.connected()).transport
        if transport is not None:
            transport.write(self.asker.request("POST", "/v1/jobs", b"x" * 1000)[:-900])
            self.told.setdefault(act, Counter())["opened"] += 1
            await asyncio.sleep(20)
            transport.abort()


class Act(NamedTuple):
    """``tasks`` do it at a time."""

    tasks: int
    once: Callable[[Hostile, str], Awaitable[Any]]


ACTS = {
    "infer": Act(96, Hostile.infer),
    "endless": Act(4, Hostile.endless),
    "memory": Act(2, Hostile.memory),
    "kernel": Act(2, Hostile.kernel),
    "large_answers": Act(2, Hostile.large_answers),
    "large_bodies": Act(2, Hostile.large_bodies),
    "aborted": Act(4, Hostile.aborted),
    "singles": Act(4, Hostile.singles),
    "slow_batches": Act(1, Hostile.slow_batches),
    "failing": Act(1, Hostile.failing),
    "huge_outputs": Act(1, Hostile.huge_outputs),
    "lists": Act(2, Hostile.lists),
    "waits": Act(4, Hostile.waits),
    "cancels": Act(2, Hostile.cancels),
    "pushes": Act(2, Hostile.pushes),
    "hanging_pushes": Act(3, Hostile.hanging_pushes),
    "configs": Act(1, Hostile.configs),
    "slow_loads": Act(0, Hostile.configs),
    "unknown_keys": Act(2, Hostile.unknown_keys),
    "unknown_models": Act(2, Hostile.unknown_models),
    "half_requests": Act(40, Hostile.half_requests),
}


async def again(hostile: Hostile, name: str, act: Act, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            await act.once(hostile, name)
        except (OSError, ValueError, KeyError) as error:
            hostile.told.setdefault(name, Counter())[repr(error)[:80]] += 1
            await asyncio.sleep(_REST_S)


async def work(given: argparse.Namespace) -> None:
    hostile, stop = Hostile(given.url, sys.stdin.readline().strip(), given.seed), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await hostile.prepare()
    acts = {name: ACTS[name] for name in listed(given.acts) or ACTS}
    if "slow_loads" in acts:
        await hostile.load_slowly()
    print("ready", flush=True)
    began, cpu = time.monotonic(), time.process_time()
    tasks = [
        asyncio.create_task(again(hostile, name, act, stop)) for name, act in acts.items() for _ in range(act.tasks)
    ]
    await stop.wait()
    share = (time.process_time() - cpu) / (time.monotonic() - began)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    hostile.asker.close()
    print(json.dumps({"cpu": round(share, 2), "told": hostile.told}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--acts", default="", help=f"default: {','.join(ACTS)}")
    os.setpriority(os.PRIO_PROCESS, 0, 0)  # the client that measures goes before others, and started this one
    uvloop.run(work(parser.parse_args()))


if __name__ == "__main__":
    main()
