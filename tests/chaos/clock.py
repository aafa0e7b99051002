"""A worker elsewhere whose clock is off. Within 30 s of skew it joins and works; beyond it, its own log says why it does not.

Needs libfaketime (package ``faketime``); the library is loaded and not its wrapper, whose semaphore outlives a kill.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from pathlib import Path

from chaos.history import History, loaded
from chaos.multi import deposited, far_worker, joined, processes
from chaos.platform import Platform
from chaos.report import arguments, check, finish, listed, say, skip
from chaos.workload import square

from tether.crypto.keyset import MAX_SKEW_MS

NAME = "far-1"
_OLD_S = 60.0
"""How old the keyset must be: it counts from its own time on, as the worker's clock tells it."""
_WAIT_S = 25.0


def library() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        skip("needs libfaketime")
    return str(found[0])


def seconds(offset: str) -> float:
    return float(offset[:-1]) * {"s": 1, "m": 60}[offset[-1]]


async def one_offset(platform: Platform, folder: Path, offset: str) -> None:
    env = {"LD_PRELOAD": library(), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
    history = History(platform, turns=1000, prefix=f"clock{offset}-{time.time()}-")
    found = {"joined": False}

    async def watch() -> None:
        found["joined"] = await asyncio.to_thread(joined, platform, NAME, _WAIT_S)
        await asyncio.sleep(5)

    with processes(platform, far_worker(folder, NAME), TETHER_HOME=str(folder), **env) as (worker,):
        await loaded([history], watch, callers=2, submitters=1)
        runs = worker.poll() is None
    await history.check(f"clock {offset}", within_s=60)
    history.check_answers(f"clock {offset}")
    log = (platform.home / "extra-worker-0.log").read_text()
    told = [line[:250] for line in log.splitlines() if "skew" in line or "clock" in line]
    say(f"clock {offset}: runs {runs}, joined {found['joined']}; {history.summary()}; its log: {told[:2]}")
    errors = [call.what for call in history.calls if call.what != "ok"]
    check(not errors, f"clock {offset}: callers got {errors[:3]}")
    if abs(seconds(offset)) * 1000 < MAX_SKEW_MS:
        check(found["joined"], f"clock {offset}: a worker within the allowed skew does not join")
    else:
        check(told, f"clock {offset}: the worker's log does not say that its clock is off: {log[-300:]}")
    await asyncio.sleep(4)


async def attacked(platform: Platform, given: Namespace) -> None:
    folder = Path(given.folder) / "elsewhere-clock"
    deposited(platform, NAME, folder)
    oldest = max(0.0, *(-seconds(offset) for offset in listed(given.offsets)))
    await asyncio.sleep(max(0.0, oldest + 10 if oldest > _OLD_S else _OLD_S))
    for offset in listed(given.offsets):
        await one_offset(platform, folder, offset)


def main() -> None:
    given = arguments(__doc__, offsets="-40s,+40s,-20s,+20s")
    library()
    with Platform(Path(given.folder) / "clock", given.port) as platform:
        platform.push("sq", square())
        asyncio.run(attacked(platform, given))
    finish()


if __name__ == "__main__":
    main()
