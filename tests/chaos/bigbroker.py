"""What callers see when a service is killed on a platform with many models: hot callers are answered again within seconds."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from pathlib import Path

from chaos.history import History, loaded
from chaos.platform import Platform
from chaos.report import arguments, check, counted, finish, listed, say
from chaos.scale import push_models
from chaos.workload import square


def held(platform: Platform) -> list[int]:
    """How many models each worker holds."""
    return [len(worker["ready"]) for worker in platform.http.get("/v1/workers").json()["workers"]]


async def all_held(platform: Platform, count: int, within_s: float = 240.0) -> None:
    """Wait until every worker holds every model."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        found = await asyncio.to_thread(held, platform)
        if len(found) == platform.workers and min(found) >= count:
            return
        await asyncio.sleep(1)
    check(False, f"workers hold {held(platform)} of {count} models after {within_s:g} s")


async def one_kill(platform: Platform, victim: str, given: Namespace) -> None:
    history = History(platform)
    killed = 0.0

    async def attack() -> None:
        nonlocal killed
        await asyncio.sleep(2)
        killed = time.time()
        platform.kill(victim)
        await asyncio.sleep(given.watch_s)

    await loaded([history], attack, callers=3, submitters=0)
    calls = [call for call in history.calls if call.ended > killed]
    late = [call.ended for call in calls if call.what != "ok" or call.ended - call.began > 0.5]
    normal_s = max(late, default=killed) - killed
    errors = counted(call.what for call in calls if call.what != "ok")
    say(
        f"{given.models} models, {victim} killed: errors {errors}, callers as before after {normal_s:.1f} s; {history.summary()}"
    )
    check(
        normal_s <= given.most_s,
        f"{victim} killed with {given.models} models: callers as before after {normal_s:.1f} s",
    )
    check(not errors, f"{victim} killed with {given.models} models: callers got {errors}")
    history.check_answers(f"{victim} killed")
    await all_held(platform, given.models + 1)


async def attacked(platform: Platform, given: Namespace) -> None:
    await all_held(platform, given.models + 1)
    for victim in listed(given.victims):
        await one_kill(platform, victim, given)


def main() -> None:
    given = arguments(__doc__, models=1000, victims="nats,worker-1,dispatcher,nats", most_s=10.0, watch_s=60.0)
    with Platform(Path(given.folder) / "bigbroker", given.port) as platform:
        platform.push("sq", square())
        push_models(platform, 0, given.models)
        asyncio.run(attacked(platform, given))
    finish()


if __name__ == "__main__":
    main()
