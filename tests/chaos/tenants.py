"""What a hostile tenant within its rights does to another one.

A tenant asks a small model at a steady rate and submits a few jobs: alone, then beside a tenant that does everything that its key
allows at once (:mod:`chaos.hostile`). The other's p99 must rise by less than ``--most`` times, and it must get no error.

All clients run on the platform's own machine. What they take of it is measured and said; where the system allows it, the measuring
client goes before all others, so that it measures the platform and not its own turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop
from chaos.platform import Platform
from chaos.report import arguments, check, finish, say
from chaos.victim import MODEL, Asked, Victim, figures
from chaos.workload import square

WINDOWS = 6
_LAST_S = 5
"""How long the hostile program may take to say what it got."""


def tenant_key(platform: Platform, tenant: str, *scopes: str) -> str:
    """The key of a tenant without a record, which has every default."""
    answer = platform.http.post("/v1/keys", json={"tenant": tenant, "scopes": list(scopes)})
    return str(answer.raise_for_status().json()["key"])


class Neighbour:
    """The hostile tenant's program."""

    def __init__(self, platform: Platform, given: Namespace) -> None:
        key = tenant_key(platform, "hostile", "infer", "jobs", "models:read", "models:write")
        words = [sys.executable, "-m", "chaos.hostile", platform.url, "--seed", str(given.seed), "--acts", given.acts]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(key + "\n")
        self._process.stdin.close()

    def ready(self) -> None:
        """Wait until it has pushed its models and begins."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"the hostile program ended: {line}")

    def end(self) -> dict[str, Any]:
        """End it; what it was told, by act."""
        self._process.terminate()
        assert self._process.stdout is not None
        try:
            said = self._process.stdout.read()
            self._process.wait(_LAST_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
        found: dict[str, Any] = json.loads(said or "{}")
        return found


def processor(platform: Platform) -> dict[str, float]:
    """Seconds of a core that each process of the platform took so far; models' own processes and trials as ``models``."""
    found: dict[str, float] = {"models": 0.0}
    for name, pid in platform.pids().items():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            found[name] = sum(process.cpu_times()[:2])
            if name != "up":
                found["models"] += sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    return found


def shares(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, int]:
    return {name: round(100 * (after[name] - before.get(name, 0.0)) / seconds) for name in after}


class Measured(NamedTuple):
    """What a tenant asked in one phase."""

    calls: list[Asked]
    jobs: list[Asked]
    pushes: list[Asked]


async def phase(platform: Platform, victim: Victim, seconds: float, label: str) -> Measured:
    """Measure for so long."""
    calls, jobs, pushes = len(victim.calls), len(victim.jobs), len(victim.pushes)
    before, began = processor(platform), time.monotonic()
    await victim.work(seconds)
    took = time.monotonic() - began
    found = Measured(victim.calls[calls:], victim.jobs[jobs:], victim.pushes[pushes:])
    asked = found.calls
    say(f"{label}:", figures(asked))
    for number in range(WINDOWS):
        first = began + number * seconds / WINDOWS
        say(f"  window {number + 1}:", figures([one for one in asked if first <= one.at < first + seconds / WINDOWS]))
    say("  jobs:", figures(found.jobs))
    say("  pushes:", figures(found.pushes))
    say("  percent of a core:", shares(before, processor(platform), took))
    return found


async def tried(platform: Platform, given: Namespace) -> None:
    victim = Victim(
        platform.url,
        tenant_key(platform, "victim", "infer", "jobs", "models:write", "models:read"),
        given.rate,
        given.seed,
    )
    await victim.work(3)  # what only the first requests cost
    alone = await phase(platform, victim, given.alone or max(15.0, given.seconds / 6), "alone")
    neighbour = Neighbour(platform, given)
    try:
        await asyncio.to_thread(neighbour.ready)
        beside = await phase(platform, victim, given.seconds, "beside the hostile tenant")
    finally:
        said = neighbour.end()
    say("the hostile client took", f"{said.get('cpu', 0):.0%}", "of a core and was told", json.dumps(said.get("told")))
    victim.asker.close()
    before, after = figures(alone.calls), figures(beside.calls)
    ratio = after.p99 / before.p99
    say(f"p99 {before.p99:.1f} ms alone, {after.p99:.1f} ms beside: {ratio:.2f} x; p50 {after.p50 / before.p50:.2f} x")
    check(ratio < given.most, f"the other tenant's p99 rose {ratio:.2f} times, from {before.p99:.1f} ms")
    check(not after.errors, f"the other tenant got errors: {after.errors}")
    for what, asked in (("jobs", beside.jobs), ("pushes", beside.pushes)):
        errors = figures(asked).errors
        check(not errors, f"{what} of the other tenant got errors: {errors}")
    unready = platform.http.get("/readyz")
    check(unready.status_code == 200, f"the gateway is not ready afterwards: {unready.text[:300]}")


def first_in_line() -> None:
    """Let the measuring client go before others where that is allowed, and nobody else of its session."""
    with suppress(OSError):
        os.setsid()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text("-10")


def ended(_number: int, _frame: object) -> None:
    """End the platform on the way out: what it runs by then would keep every processor."""
    raise SystemExit(1)


def main() -> None:
    signal.signal(signal.SIGTERM, ended)
    given = arguments(__doc__, seconds=60.0, alone=0.0, rate=40.0, most=2.0, acts="", workers=2)
    with Platform(Path(given.folder) / "tenants", given.port, workers=given.workers) as platform:
        owner = Namespace(key=tenant_key(platform, "victim", "models:write", "models:read"))
        with platform.client(key=owner.key) as http:
            http.post(f"/v1/models/{MODEL}/versions", content=square()).raise_for_status()
        platform.ready(f"victim/{MODEL}")
        first_in_line()
        uvloop.run(tried(platform, given))
    finish()


if __name__ == "__main__":
    main()
