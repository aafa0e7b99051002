"""SIGKILL and SIGSTOP of each process under load, by a seeded plan; then the check of everything that clients were told.

Workers first, some 14 s apart; then gateway, dispatcher, model store, broker and workers in any order, 7 s apart, each fifth
time two at once; then pauses of each. Prints what callers saw of each kind of fault.
"""

from __future__ import annotations

import asyncio
import bisect
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from chaos.history import Call, History, loaded
from chaos.platform import Platform
from chaos.report import arguments, counted, finish, listed, percentile, say, spread, stamp
from chaos.workload import square

SERVICES = ("gateway", "dispatcher", "modelstore", "nats")


class Fault(NamedTuple):
    at: float
    kind: str
    pause_s: float


class Faults:
    """Makes faults and remembers them."""

    def __init__(self, platform: Platform, rng: random.Random) -> None:
        self.platform = platform
        self.rng = rng
        self.made: list[Fault] = []

    async def make(self, kind: str, names: list[str], settle_s: float, pause_s: float = 0.0) -> None:
        for name in names:  # the one before may be starting again
            for _ in range(100):
                if self.platform.send(name, 0):
                    break
                await asyncio.sleep(0.1)
        self.made.append(Fault(time.time(), kind, pause_s))
        if pause_s:
            self.platform.pause(*names)
            await asyncio.sleep(pause_s)
            self.platform.resume(*names)
        else:
            self.platform.kill(*names)
        await asyncio.sleep(settle_s)

    async def kill_workers(self, count: int) -> None:
        for _ in range(count):
            await self.make("kill worker", [self.rng.choice(self.platform.worker_names)], 13 + 2 * self.rng.random())

    async def kill_others(self, count: int) -> None:
        workers = self.platform.worker_names
        plan = [[*SERVICES, self.rng.choice(workers)][number % 5] for number in range(count)]
        self.rng.shuffle(plan)
        for number, name in enumerate(plan):
            names = (
                [name] if number % 5 else sorted({name, self.rng.choice(["gateway", "dispatcher", "nats", *workers])})
            )
            kind = "kill " + " and ".join(one.partition("-")[0] for one in names)
            await self.make(kind, names, 6 + 2 * self.rng.random())

    async def pause_each(self, seconds: list[float]) -> None:
        for pause_s in seconds:
            for name in ("worker-1", *SERVICES):
                kind = f"pause {name.partition('-')[0]} for {pause_s:g} s"
                await self.make(kind, [name], 5 + 5 * (pause_s > 5), pause_s)


async def attacked(platform: Platform, given: Namespace) -> None:
    history, faults = History(platform), Faults(platform, random.Random(given.seed))

    async def attack() -> None:
        pushing = asyncio.create_task(history.push(2.0))
        await asyncio.sleep(5)
        await faults.kill_workers(given.worker_kills)
        await faults.kill_others(given.other_kills)
        await faults.pause_each([float(one) for one in listed(given.pauses)])
        history.stop = True
        await pushing

    await loaded([history], attack, callers=5, call_pause_s=0.04, submit_pause_s=0.1, seed=given.seed)
    ended = await history.check("after all faults")
    history.check_list("after all faults")
    history.check_answers("under faults")
    tell(history, faults.made, ended)
    say("audit:", platform.audit())
    say("restarts", platform.endpoints["restarts"], "usage", platform.usage())


def tell(history: History, faults: list[Fault], ended: dict[int, dict[str, Any]]) -> None:
    """By kind of fault: what callers saw, how long until they were answered as before, and until open jobs had ended."""
    usual = percentile([call.ended - call.began for call in history.calls if call.what == "ok"], 0.5)
    say(history.summary(), f"median {usual * 1e3:.1f} ms, pushes {counted(push.what for push in history.pushes)}")
    kinds: dict[str, list[tuple[list[Call], float, list[float]]]] = {}
    times = [fault.at for fault in faults]
    owned: list[list[Call]] = [[] for _ in faults]
    for call in history.calls:  # of the first fault that came while it was open, else of the last before it
        place = bisect.bisect_right(times, call.began)
        if place < len(faults) and times[place] < call.ended:
            owned[place].append(call)
        elif place:
            owned[place - 1].append(call)
    for fault, calls in zip(faults, owned, strict=True):
        late = [call.ended for call in calls if call.what != "ok" or call.ended - call.began > max(0.25, 6 * usual)]
        within = fault.at + max(fault.pause_s, 0.5)
        jobs = [
            stamp(ended[number]["finished_at"]) - fault.at
            for number, job in history.jobs.items()
            if job.acknowledged < within and ended[number].get("finished_at")
        ]
        normal_after = max(late, default=fault.at) - fault.at
        kinds.setdefault(fault.kind, []).append((calls, normal_after, [one for one in jobs if one > 0]))
    for kind, many in kinds.items():
        errors = counted(call.what for calls, _, _ in many for call in calls if call.what != "ok")
        slowest = [max((call.ended - call.began for call in calls), default=0.0) for calls, _, _ in many]
        print(f"  {kind} ({len(many)}): errors {errors or 'none'}")
        print(
            f"    slowest answer s: {spread(slowest)}; callers as before after s: {spread([one for _, one, _ in many])}"
        )
        print(f"    open jobs ended after s: {spread([max(jobs) for _, _, jobs in many if jobs])}")


def main() -> None:
    given = arguments(__doc__, worker_kills=20, other_kills=40, pauses="2,8,30", workers=2)
    with Platform(Path(given.folder) / f"kills-{given.seed}", given.port, workers=given.workers) as platform:
        platform.push("sq", square())
        asyncio.run(attacked(platform, given))
    finish()


if __name__ == "__main__":
    main()
