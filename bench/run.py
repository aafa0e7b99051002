"""The table of bench/README.md, measured side by side in one run: ``make bench``, or ``python -m bench.run --quick``.

Everything runs on this machine, load generator included. Rounds are interleaved, so that a machine that grows slow or
fast is so for everyone; the table holds medians. It is printed and written to bench/results.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime

from bench import durable, signing, transfer
from bench.servers import ROOT, Server, bare_fastapi, environment, request_body, tether_platform

CONNECTIONS = (1, 16, 64)
RESULTS = ROOT / "bench" / "results.md"
SERVERS = {
    "tether": "Tether, two workers",
    "fastapi": "FastAPI + uvicorn",
    "fastapi-httptools": "FastAPI + uvicorn + httptools",
}
FLOOR_RATIO = 2.0
"""Against FastAPI + uvicorn, as ``pip install fastapi uvicorn`` gives it."""
FLOOR_JOBS = 2000.0


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    rounds: int
    seconds: float
    jobs: int
    model_mb: int


FULL = Plan(rounds=3, seconds=4.0, jobs=4000, model_mb=64)
QUICK = Plan(rounds=1, seconds=1.0, jobs=400, model_mb=8)


@dataclass
class Samples:
    """Every number measured, by what was measured."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: int = 0

    def add(self, name: str, value: float) -> None:
        self.values[name].append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def show(self, name: str) -> str:
        number = self.median(name)
        return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


def run_json(*words: str) -> dict[str, Any]:
    """Run a module of this package in a process of its own and read the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=False
    )
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def load(samples: Samples, name: str, server: Server, body: Path, *, connections: int, seconds: float) -> None:
    """Load one server over HTTP and keep what was measured."""
    headers = [word for pair in server.headers.items() for word in ("--header", ":".join(pair))]
    report = run_json(
        "bench.load", server.infer_url, "--body", str(body), "--connections", str(connections),
        "--seconds", str(seconds), *headers,
    )  # fmt: skip
    for key in ("per_s", "p50_ms", "p99_ms"):
        samples.add(f"{name} {connections} {key}", report[key])
    samples.errors += report["errors"]
    say(f"{name}, {connections} connections: {report['per_s']:,.0f}/s, p99 {report['p99_ms']:.1f} ms")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def one_round(samples: Samples, plan: Plan, servers: dict[str, Server], folder: Path) -> None:
    """Measure everything once."""
    for rows in (1, 64):
        raw = run_json("bench.raw_ort", "--seconds", str(plan.seconds / 2), "--rows", str(rows))
        for key, value in raw.items():
            samples.add(f"raw {rows} {key}", value)
    for connections in CONNECTIONS:
        for name, server in servers.items():
            load(samples, name, server, folder / "body.json", connections=connections, seconds=plan.seconds)
    image = json.loads((folder / "body.json").read_bytes())["inputs"][0]["data"]
    tether = servers["tether"]
    jobs = asyncio.run(durable.measure(tether, image, plan.jobs))
    samples.add("jobs accepted", jobs.accepted)
    samples.add("jobs done", jobs.done)
    say(f"durable jobs: {jobs.done:,.0f}/s end to end")
    move_model(samples, plan, tether, folder / "table.onnx")
    spent = signing.measure(tether, (folder / "body.json").read_bytes(), connections=64, seconds=plan.seconds)
    samples.add("signing", spent.share * 100)
    samples.add("gateway cpu", spent.cpu_s / spent.requests * 1e6)
    say(f"signing and verifying: {spent.share:.1%} of a gateway's CPU")


def move_model(samples: Samples, plan: Plan, tether: Server, path: Path) -> None:
    """Push a model of fresh random weights and fetch it again."""
    size = transfer.make_model(path, plan.model_mb) / 1e6
    version, push_s = transfer.push(tether, "table", path)
    pull_s = asyncio.run(transfer.pull(tether, "table", version))
    samples.add("push", size / push_s)
    samples.add("pull", size / pull_s)
    say(f"model of {size:.0f} MB: push {size / push_s:.0f} MB/s, pull {size / pull_s:.0f} MB/s")


def table(samples: Samples, plan: Plan) -> str:
    """The results as Markdown."""
    head = "| connections | server | requests/s | p50 ms | p99 ms | Tether is |\n|---:|---|---:|---:|---:|---:|"
    lines = [row(samples, connections, name) for connections in CONNECTIONS for name in SERVERS]
    measured = [
        ("ONNX Runtime in-process, 1 row a call, one thread", "raw 1 per_s", "rows/s"),
        ("ONNX Runtime in-process, 64 rows a call, one thread", "raw 64 per_s", "rows/s"),
        ("durable jobs until accepted, durability fast", "jobs accepted", "jobs/s"),
        ("durable jobs end to end, durability fast, two workers", "jobs done", "jobs/s"),
        (f"model push, {plan.model_mb} MiB of random weights, inspection included", "push", "MB/s"),
        ("model pull, verified and synced to disk", "pull", "MB/s"),
        ("CPU of a gateway at 64 connections", "gateway cpu", "µs a request"),
        ("of it for signing and verifying", "signing", "%"),
    ]
    rest = [f"| {label} | {samples.show(name)} | {unit} |" for label, name, unit in measured]
    return "\n".join([machine(plan), "", head, *lines, "", "| measure | median | unit |\n|---|---:|---|", *rest, ""])


def row(samples: Samples, connections: int, name: str) -> str:
    """One server at one number of connections."""
    numbers = [samples.show(f"{name} {connections} {key}") for key in ("per_s", "p50_ms", "p99_ms")]
    times = "" if name == "tether" else f"{ratio(samples, connections, name):.2f} x"
    return "| " + " | ".join([str(connections), SERVERS[name], *numbers, times]) + " |"


def ratio(samples: Samples, connections: int, other: str) -> float:
    """How many times the requests a second of another server Tether answers."""
    return samples.median(f"tether {connections} per_s") / samples.median(f"{other} {connections} per_s")


def machine(plan: Plan) -> str:
    """What was measured where."""
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {len(os.sched_getaffinity(0))} cores that load generator, servers, "
        f"broker and two workers share; Python {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}. "
        f"Digits model, JSON, one row a request; medians of {plan.rounds} interleaved rounds of {plan.seconds:g} s."
    )


def below_floor(samples: Samples) -> list[str]:
    """Promises that the numbers do not keep."""
    reached = ratio(samples, 64, "fastapi")
    found = []
    if reached < FLOOR_RATIO:
        found.append(f"at 64 connections {reached:.2f} times the bare FastAPI server, at least {FLOOR_RATIO:g}")
    if samples.median("jobs done") < FLOOR_JOBS:
        found.append(f"{samples.median('jobs done'):.0f} durable jobs/s, at least {FLOOR_JOBS:g}")
    if samples.errors:
        found.append(f"{samples.errors} requests failed")
    return found


def main() -> int:
    """Measure, print and write the table; 1 when a floor is not reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round: proves that it runs, measures nothing")
    plan = QUICK if parser.parse_args().quick else FULL
    samples = Samples()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tether-bench-")))
        (folder / "body.json").write_bytes(request_body())
        servers = {
            "tether": stack.enter_context(tether_platform(durability="fast")),
            "fastapi": stack.enter_context(bare_fastapi("h11")),
            "fastapi-httptools": stack.enter_context(bare_fastapi("httptools")),
        }
        for _ in range(plan.rounds):
            one_round(samples, plan, servers, folder)
    text = table(samples, plan)
    print(text)
    missed = below_floor(samples)
    for words in missed:
        say(f"floor missed: {words}")
    if plan is QUICK:
        return 1 if samples.errors else 0
    RESULTS.write_text(text)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
