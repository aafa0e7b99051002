"""Mixed load for a while: memory, open files, streams and consumers, and what is left when it is over."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from chaos.history import History, loaded
from chaos.platform import Platform, Usage
from chaos.report import arguments, check, finish, say
from chaos.workload import add_constant, square


class Mark(NamedTuple):
    """What was counted at one moment."""

    seconds: float
    usage: Usage
    broker: dict[str, Any]
    jobs: int


def broker(platform: Platform) -> dict[str, Any]:
    found, server = platform.monitor("/jsz"), platform.monitor("/varz")
    return {
        "streams": found["streams"],
        "consumers": found["consumers"],
        "store_mb": round(found["storage"] / 1e6, 1),
        "subscriptions": server["subscriptions"],
        "slow": server["slow_consumers"],
    }


async def churn(history: History) -> None:
    """Push, delete; make and revoke keys; connections that come and go."""
    number = 0
    async with history.client() as http:
        while not history.stop:
            number += 1
            name = f"c{number % 7}"
            try:
                pushed = (await http.post(f"/v1/models/{name}/versions", content=add_constant(number))).json()
                made = (await http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]})).json()
                await http.delete(f"/v1/keys/{made['id']}")
                await http.delete(f"/v1/models/{name}/aliases/latest")
                await http.delete(f"/v1/models/{name}/versions/{pushed['version']}")
                async with history.client() as other:
                    await other.get("/v1/jobs", params={"limit": 50})
            except (httpx.HTTPError, KeyError) as error:
                history.refused.append((time.time(), f"churn: {error!r}"))
            await asyncio.sleep(2)


async def soaked(platform: Platform, given: Namespace) -> None:
    history, marks = History(platform, turns=300), list[Mark]()

    async def watch() -> None:
        began, other = time.monotonic(), asyncio.create_task(churn(history))
        while time.monotonic() - began < given.seconds:
            await asyncio.sleep(min(60, given.seconds / 6))
            seconds = time.monotonic() - began
            counts = await asyncio.to_thread(broker, platform)
            marks.append(Mark(seconds, platform.usage(), counts, len(history.jobs)))
            say(f"{seconds:.0f} s", len(history.calls), "calls", len(history.jobs), "jobs", marks[-1].usage, counts)
        history.stop = True
        await other

    await loaded([history], watch, callers=4, submitters=4, call_pause_s=0.02, submit_pause_s=0.02, seed=given.seed)
    growth(given, marks)
    await history.check("soak")
    history.check_answers("soak")
    say(history.summary())
    errors = sum(call.what != "ok" for call in history.calls)
    check(not errors, f"{errors} callers got errors though nothing was wrong")
    await asyncio.to_thread(clear, platform)
    await asyncio.sleep(25)
    left = broker(platform)
    say("all but one model deleted:", left, "idle cpu %", platform.cpu(10), "audit:", platform.audit())
    check(left["consumers"] <= marks[0].broker["consumers"], f"consumers are left of deleted versions: {left}")


def growth(given: Namespace, marks: list[Mark]) -> None:
    """From the second mark, when caches are warm, to the last."""
    first, last = marks[min(1, len(marks) - 1)], marks[-1]
    thousands = max(1, last.jobs - first.jobs) / 1000
    for name, (memory, files) in last.usage.items():
        if name not in first.usage:
            continue
        before, files_before = first.usage[name]
        each = (memory - before) / thousands
        say(f"{name}: {before} -> {memory} MB, {each:.2f} MB for each 1,000 jobs; open files {files_before} -> {files}")
        check(files <= files_before + 20, f"{name} opened {files - files_before} files that it did not close")
        check(each <= given.most_mb or memory - before < 20, f"{name} grew by {each:.1f} MB for each 1,000 jobs")
    check(not last.broker["slow"], f"{last.broker['slow']} slow consumers")


def clear(platform: Platform) -> None:
    for model in platform.http.get("/v1/models").json()["models"]:
        name = model["name"]
        if name != "sq":
            for version in platform.http.get(f"/v1/models/{name}").json().get("versions", []):
                platform.http.delete(f"/v1/models/{name}/aliases/latest")
                platform.http.delete(f"/v1/models/{name}/versions/{version['version']}")


def main() -> None:
    given = arguments(__doc__, seconds=600.0, most_mb=1.0)
    with Platform(Path(given.folder) / "soak", given.port) as platform:
        platform.push("sq", square())
        asyncio.run(soaked(platform, given))
    finish()


if __name__ == "__main__":
    main()
