"""The four strategies of load balancing side by side: ``python -m bench.balance``, in interleaved rounds, medians as a table.

Two workers on one platform, the second with a weight of 3. Models sleep for the time of a run, as one does that waits for a device,
and answer with the worker that ran them: ``even`` takes both workers equally long, ``uneven`` takes the second one three times as
long. ``digits`` needs next to nothing, so what is measured there is the platform.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import uvloop

from bench.load import HEAD_END, Meter, Target, drive, post
from bench.rollout import wait
from bench.run import say
from bench.servers import Server, environment, request_body, tether, tether_platform
from tether import Client
from tether.model.config import LoadBalancing

SECOND = "worker-2"
WEIGHT = 3
RUN_S = 0.004

CODE = """
import time
import numpy as np


class Model:
    def load(self, directory):
        self.second = "%s" in str(directory)

    def predict(self, inputs):
        time.sleep(%s if self.second else %s)
        return {"y": np.full_like(inputs["x"], 2 if self.second else 1)}
"""


class Case(NamedTuple):
    """One model under one load."""

    model: str
    connections: int

    def __str__(self) -> str:
        return f"{self.model}, {self.connections} connection{'s' * (self.connections > 1)}"


MODELS = ("even", "uneven", "digits")
CASES = (Case("even", 1), Case("even", 32), Case("uneven", 1), Case("uneven", 32), Case("digits", 64))


class Watch(Meter):
    """Counts which worker made an answer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.second = 0

    def answered(self, sent: float, answer: bytes) -> None:
        super().answered(sent, answer)
        if self.open and b'"data":[2.0]' in answer[answer.index(HEAD_END) :]:
            self.second += 1


class Found(NamedTuple):
    """What one run measured."""

    per_s: float
    p50_ms: float
    p99_ms: float
    share: float
    """Of the second worker."""


def driven(target: Target, connections: int, seconds: float, settle_s: float) -> Found:
    """A closed loop; what happens in the first ``settle_s`` seconds, while workers follow, does not count.

    Raises:
        RuntimeError: a request failed.
    """
    watch = Watch()
    report, error = uvloop.run(drive(target, connections, seconds, settle_s, watch))
    if error:
        raise RuntimeError(f"a request failed: {error}")
    return Found(report.per_s, report.p50_ms, report.p99_ms, watch.second / report.requests)


class Bench:
    """The platform and what was measured on it."""

    def __init__(self, server: Server, cases: list[Case], seconds: float, settle_s: float) -> None:
        self._server = server
        self.cases = cases
        self._seconds = seconds
        self._settle_s = settle_s
        self.found: dict[tuple[Case, LoadBalancing], list[Found]] = defaultdict(list)

    def measure(self, case: Case, strategy: LoadBalancing) -> None:
        with httpx.Client(trust_env=False, headers=self._server.headers) as http:
            told = {"load_balancing": strategy.value}
            http.patch(f"{self._server.url}/v1/models/{case.model}/config", json=told).raise_for_status()
        headers = {"Content-Type": "application/json", **self._server.headers}
        body = request_body() if case.model == "digits" else one_row()
        target = post(f"{self._server.url}/v2/models/{case.model}/infer", body, headers)
        found = driven(target, case.connections, self._seconds, self._settle_s)
        say(f"{case}, {strategy}: {found.per_s:,.0f}/s, p50 {found.p50_ms:.1f} ms, second {found.share:.0%}")
        self.found[case, strategy].append(found)

    def table(self) -> str:
        rows = [
            "| model | strategy | second worker's share | requests/s | | p50 ms | p99 ms |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for case in self.cases:
            usual = statistics.median(found.per_s for found in self.found[case, LoadBalancing.LEAST_CONNECTIONS])
            for strategy in LoadBalancing:
                per_s, p50, p99, share = map(statistics.median, zip(*self.found[case, strategy], strict=True))
                part = f"{share:.0%}" if case.model != "digits" else ""
                rows.append(
                    f"| {case} | `{strategy}` | {part} | {per_s:,.0f} | {per_s / usual:.2f} x | {p50:.1f} | {p99:.1f} |"
                )
        return "\n".join(rows)


def one_row() -> bytes:
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0]}]}).encode()


def bundle(folder: Path, second_s: float) -> Path:
    """A model that sleeps, one request a run."""
    folder.mkdir()
    spec = {"datatype": "FP32", "shape": [-1, 1]}
    description = {
        "className": "Model",
        "inputs": [{"name": "x", **spec}],
        "outputs": [{"name": "y", **spec}],
        "maxBatchSize": 0,
    }
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "model.py").write_text(CODE % (SECOND, second_s, RUN_S))
    return folder


@contextmanager
def second_worker(server: Server) -> Iterator[None]:
    """A worker of another weight beside the one that there is, until the block ends."""
    assert server.home is not None  # noqa: S101 - a platform of ours has one
    folder = server.home.root
    tether(folder, "identity", "add", SECOND, "--role", "worker")
    words = [sys.executable, "-m", "tether_cli", "worker", "--name", SECOND, "--data-dir", str(folder)]
    more = {"TETHER_WORKER_WEIGHT": str(WEIGHT), "TETHER_OPS_PORT": "0"}
    with subprocess.Popen(words, cwd=folder, env=environment() | more, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def both_hold(sdk: Client, model: str) -> bool:
    return all(version["workers"] == 2 for version in sdk.model(model)["versions"])


def main() -> int:
    """Start a platform and a second worker, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--settle", type=float, default=3.0, metavar="SECONDS", help="before each measurement")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="tether-balance-") as name,
        tether_platform(1) as server,
        second_worker(server),
        Client(server.url, server.key) as sdk,
    ):
        for model, second_s in (("even", RUN_S), ("uneven", 3 * RUN_S)):
            sdk.push(model, bundle(Path(name) / model, second_s))
        for model in MODELS:
            wait(lambda: both_hold(sdk, model), f"both workers hold {model}", 60.0)  # noqa: B023
        cases = [case for case in CASES if case.model in given.models]
        bench = Bench(server, cases, given.seconds, given.settle)
        strategies = list(LoadBalancing)
        for number in range(given.rounds):
            for case in bench.cases:
                # each goes first once in a while: what a strategy finds is what the one before has left
                for strategy in strategies[number % len(strategies) :] + strategies[: number % len(strategies)]:
                    bench.measure(case, strategy)
        print(bench.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
