"""Promote and roll back under load: ``python -m bench.rollout``. It ends with 1 when a request failed, an answer was not of
the version that it names, or gateways or workers took too long to follow.

The model is a program that answers with its version and the process that ran it, one process a version and worker, so an
answer tells who made it. Requests come at a steady rate while version 2 is pushed, promoted and rolled back, again and again.
A time counts from the moment the change was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.load import HEAD_END, Meter, Target, keep_connected, post
from bench.run import say
from bench.servers import Server, tether_platform
from tether import Client

NAME = "rollout"
WORKERS_S = 10.0
"""Every worker has answered with the new version by then."""

CODE = """
import os
import numpy as np

VERSION = %d


class Model:
    def predict(self, inputs):
        rows = len(inputs["x"])
        return {
            "version": np.full((rows, 1), VERSION, np.int64),
            "process": np.full((rows, 1), os.getpid(), np.int64),
        }
"""


class _Output(msgspec.Struct):
    name: str
    data: list[int]


class _Answer(msgspec.Struct):
    model_version: str
    outputs: list[_Output]


class Seen(NamedTuple):
    """One answer: when its request was sent and it came, which version made it, in which process."""

    sent: float
    came: float
    version: int
    process: int


class Watch(Meter):
    """Every answer of the load; an answer of another version than it names is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self._decode = msgspec.json.Decoder(_Answer).decode

    def answered(self, sent: float, answer: bytes) -> None:
        came = time.perf_counter()
        if answer[9:12] != b"200":
            self.failed(answer[:300].decode("latin-1"))
            return
        body = self._decode(answer[answer.index(HEAD_END) + 4 :])
        ran = {output.name: output.data for output in body.outputs}
        if ran["version"] != [int(body.model_version)]:
            self.failed(f"an answer names version {body.model_version} and was made by {ran['version']}")
        self.seen.append(Seen(sent, came, ran["version"][0], ran["process"][0]))


class Move(NamedTuple):
    """A promote or a rollback; times in seconds since it was asked for."""

    what: str
    acknowledged: float
    first_answer: float
    every_worker: float
    last_old: float
    """When the last request was sent that the version before answered; 0 when there was none."""


@dataclass
class Rollout:
    """A platform with two versions and requests for the alias between them."""

    sdk: Client
    watch: Watch
    workers: int
    hold_s: float

    def move(self, what: str, version: int, change: Callable[[], object]) -> Move:
        """Change the alias and look until every worker has answered with ``version``, then ``hold_s`` longer.

        Raises:
            TimeoutError: not every worker did.
        """
        began, start = time.perf_counter(), len(self.watch.seen)
        change()
        acknowledged = time.perf_counter() - began
        firsts: dict[int, float] = {}

        def everybody() -> bool:
            for seen in self.watch.seen[start:]:
                if seen.version == version and seen.sent >= began:
                    firsts.setdefault(seen.process, seen.came - began)
            return len(firsts) >= self.workers

        wait(everybody, f"{what}: every worker answers with version {version}", WORKERS_S)
        pause(self.hold_s)
        old = [seen.sent - began for seen in self.watch.seen[start:] if seen.version != version and seen.sent >= began]
        found = Move(what, acknowledged, min(firsts.values()), max(firsts.values()), max(old, default=0.0))
        say(f"{what}: every worker after {found.every_worker * 1e3:.0f} ms")
        return found


def pause(seconds: float) -> None:
    """Let the load go on for that long."""
    threading.Event().wait(seconds)


def wait(true: Callable[[], bool], what: str, limit_s: float) -> None:
    """Look until ``true``, every few milliseconds.

    Raises:
        TimeoutError: not in ``limit_s`` seconds.
    """
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {limit_s:g} s: {what}")
        pause(0.005)


def bundle(folder: Path, version: int) -> Path:
    """The folder of one version of the model."""
    folder.mkdir()
    output = {"datatype": "INT64", "shape": [-1, 1]}
    description = {
        "className": "Model",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}],
        "outputs": [{"name": "version", **output}, {"name": "process", **output}],
        "maxBatchSize": 64,
    }
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "model.py").write_text(CODE % version)
    return folder


def push(sdk: Client, folder: Path, version: int, workers: int) -> float:
    """Push a version; seconds until every worker holds it."""
    began = time.perf_counter()
    told = sdk.push(NAME, bundle(folder / str(version), version))
    if told["version"] != version:
        raise RuntimeError(f"the platform called version {version} {told['version']}")

    def held() -> bool:
        (found,) = [one for one in sdk.model(NAME)["versions"] if one["version"] == version]
        return int(found["workers"]) == workers

    wait(held, f"every worker holds version {version}", 60.0)
    return time.perf_counter() - began


@contextmanager
def load(target: Target, watch: Watch, connections: int, rate: float) -> Iterator[None]:
    """``rate`` requests a second over all connections while the block runs; each has one open at a time."""
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()

    async def connect(number: int) -> None:
        await asyncio.sleep(number / rate)
        await keep_connected(target, watch, stopping, connections / rate)

    async def drive() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(connections):
                group.create_task(connect(number))

    thread = threading.Thread(target=lambda: loop.run_until_complete(drive()), name="load")
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(60)
        loop.close()


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    workers: int
    rounds: int
    rate: float
    hold: float
    follow: float


def measure(server: Server, folder: Path, plan: Plan) -> int:
    """Print the table; 1 when something failed.

    Raises:
        TimeoutError: workers did not follow.
    """
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0]}]}).encode()
    headers = {"Content-Type": "application/json", **server.headers}
    target = post(f"{server.url}/v2/models/{NAME}/versions/production/infer", body, headers)
    watch, moves = Watch(), []
    with Client(server.url, server.key) as sdk:
        push(sdk, folder, 1, plan.workers)
        sdk.promote(NAME, 1)
        rollout = Rollout(sdk, watch, plan.workers, plan.hold)
        with load(target, watch, 16, plan.rate):
            wait(lambda: len(watch.seen) > 100, "the load goes", 30.0)
            pushed_s = push(sdk, folder, 2, plan.workers)
            for _ in range(plan.rounds):
                moves.append(rollout.move("promote", 2, lambda: sdk.promote(NAME, 2)))
                moves.append(rollout.move("rollback", 1, lambda: sdk.rollback(NAME)))
    print(table(watch, moves, pushed_s))
    late = [move for move in moves if move.last_old > plan.follow]
    for move in late:
        say(f"{move.what}: the version before answered a request sent {move.last_old:.2f} s later")
    if watch.errors:
        say(f"{watch.errors} requests failed: {watch.first_error}")
    return 1 if late or watch.errors else 0


def table(watch: Watch, moves: list[Move], pushed_s: float) -> str:
    """What was measured, as Markdown."""
    seen = watch.seen
    spans = sorted(one.came - one.sent for one in seen)
    rate = len(seen) / (seen[-1].came - seen[0].sent)
    rows = [
        ("requests, failed", f"{len(seen):,}, {watch.errors}"),
        ("requests a second; p50, p99, longest", f"{rate:,.0f}; {ms(spans[len(spans) // 2])}, {ms(spans[len(spans) * 99 // 100])}, {ms(spans[-1])}"),
        ("push of version 2 until every worker holds it", f"{pushed_s:.1f} s"),
    ]  # fmt: skip
    for what in ("promote", "rollback"):
        ones = [move for move in moves if move.what == what]
        for name, field in (
            ("acknowledged", "acknowledged"),
            ("first answer of the other version", "first_answer"),
            ("every worker answers with it", "every_worker"),
            ("last request that the version before got", "last_old"),
        ):
            times = [getattr(move, field) for move in ones]
            rows.append((f"{what}: {name}", f"{ms(statistics.median(times))}, at most {ms(max(times))}"))
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def main() -> int:
    """Start a platform, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="promotes, and as many rollbacks")
    parser.add_argument("--rate", type=float, default=1000.0, metavar="N", help="requests a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hold", type=float, default=1.0, metavar="SECONDS", help="between two changes")
    parser.add_argument(
        "--follow", type=float, default=1.0, metavar="SECONDS", help="when all requests get the version"
    )
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="tether-rollout-") as name, tether_platform(plan.workers) as server:
        try:
            return measure(server, Path(name), plan)
        except TimeoutError as error:
            print(error, file=sys.stderr)
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
