"""SIGKILL of the supervisor (even rounds) or of every process at once (odd rounds) under load, then ``tether up`` again.

Children end with their supervisor; models, keys, tenants and jobs are afterwards what they were before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from chaos.history import History, loaded
from chaos.platform import Platform, belongs, lives
from chaos.report import arguments, check, fail, finish, say
from chaos.workload import add_constant, square

_GONE_S = 15.0
_FLEETING = ("workers", "ready", "held_by")
"""What of a version may differ after a restart."""


def world(platform: Platform) -> dict[str, Any]:
    """What must be the same before and after."""
    get = platform.http.get
    models = {}
    for model in get("/v1/models").json()["models"]:
        found = get(f"/v1/models/{model['name']}").json()
        versions = [
            {name: value for name, value in version.items() if name not in _FLEETING} for version in found["versions"]
        ]
        models[model["name"]] = {"versions": versions, "aliases": found.get("aliases")}
    keys = sorted((key["id"], key["tenant"], str(key.get("revoked"))) for key in get("/v1/keys").json()["keys"])
    return {
        "keys": keys,
        "models": models,
        "tenants": sorted(one["name"] for one in get("/v1/tenants").json()["tenants"]),
    }


def populate(platform: Platform) -> str:
    """Models with aliases, tenants and keys; the text of a key that was revoked."""
    for number in range(5):
        platform.push(f"t{number}", add_constant(number))
        platform.push(f"t{number}", add_constant(number + 50))
        alias = {"version": 1, "force": True}
        platform.http.put(f"/v1/models/t{number}/aliases/production", json=alias).raise_for_status()
        platform.cli("tenant", "create", f"ten{number}")
        platform.cli("key", "create", "--tenant", f"ten{number}", "--scope", "jobs")
    made = json.loads(platform.cli("key", "create", "--tenant", "ten0", "--scope", "jobs", "--json"))
    platform.cli("key", "revoke", made["id"])
    return str(made["key"])


def still_there(pids: dict[str, int]) -> dict[str, int]:
    """What of these lives when their time to end is over."""
    end = time.monotonic() + _GONE_S
    left = pids
    while left and time.monotonic() < end:
        left = {name: pid for name, pid in left.items() if lives(pid)}
        time.sleep(0.02)
    return left


async def one_round(platform: Platform, number: int, history: History, rng: random.Random, revoked: str) -> None:
    before = await asyncio.to_thread(world, platform)

    async def restart() -> None:
        await asyncio.sleep(4 + 3 * rng.random())
        pids = {name: pid for name, pid in platform.pids().items() if belongs(pid, platform.home)}
        victims = ["up"] if number % 2 == 0 else list(pids)
        began = time.monotonic()
        for name in victims:
            os.kill(pids[name], signal.SIGKILL)
        await asyncio.to_thread(platform.ended)
        left = await asyncio.to_thread(still_there, pids)
        check(not left, f"round {number}: running {_GONE_S:g} s after the kill: {left}")
        gone_s = time.monotonic() - began
        await asyncio.to_thread(platform.up)
        what = "supervisor" if number % 2 == 0 else "everything"
        say(f"round {number}: killed {what}, children gone after {gone_s:.2f} s, up again in {platform.ready_s:.1f} s")
        await asyncio.sleep(3)

    await loaded([history], restart, submitters=6, call_pause_s=0.03, submit_pause_s=0.01, seed=number)
    after = await asyncio.to_thread(world, platform)
    differs = [name for name in before if before[name] != after[name]]
    check(not differs, f"round {number}: not as before the restart: {differs}")
    with platform.client(key=revoked) as http:
        status = http.get("/v1/jobs").status_code
    check(status == 401, f"round {number}: a revoked key is answered with {status}")
    say(f"round {number}: {len(history.jobs)} jobs acknowledged so far; audit: {platform.audit()}")


async def attacked(platform: Platform, given: Namespace, revoked: str) -> None:
    history, rng = History(platform, turns=6000), random.Random(given.seed)
    for number in range(given.rounds):
        await one_round(platform, number, history, rng, revoked)
    await history.check("after all rounds", within_s=120)
    history.check_list("after all rounds")
    history.check_answers("after all rounds")
    say(history.summary())


def main() -> None:
    given = arguments(__doc__, rounds=6, durability="fast")
    home = Path(given.folder) / f"supervisor-{given.seed}"
    with Platform(home, given.port, durability=given.durability) as platform:
        content = square()
        platform.push("sq", content)
        revoked = populate(platform)
        asyncio.run(attacked(platform, given, revoked))
        pulled = home / "pulled"
        platform.cli("model", "pull", "sq", str(pulled))
        files = [path for path in pulled.rglob("*") if path.is_file()]
        digests = {hashlib.sha256(path.read_bytes()).digest() for path in files}
        if hashlib.sha256(content).digest() not in digests:
            fail("the model that is pulled is not the one that was pushed")
    finish()


if __name__ == "__main__":
    main()
