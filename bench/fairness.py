"""What one tenant's flood does to another: ``python -m bench.fairness``, in interleaved rounds, medians as a table.

Tenant ``calm`` asks in a closed loop on a few connections; alone, and while tenant ``flood`` asks on hundreds. The model
takes milliseconds a request, so the workers are what is short.
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
from typing import Any

import httpx
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.run import say
from bench.servers import ROOT, Server, environment, push, tether_platform

INPUTS, WIDTH, LAYERS = 8, 512, 64
"""Some milliseconds a request on one core, and little to parse."""


def slow_model(path: Path) -> None:
    """Layers of one matrix: work that takes a core's time and little of anything else."""
    weights = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    nodes, last = [helper.make_node("MatMul", ["x", "first"], ["t"])], "t"
    for layer in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"m{layer}"]))
        last = f"t{layer}"
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [last]))
    nodes.append(helper.make_node("ReduceMean", [last], ["y"], axes=[1], keepdims=1))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights[:INPUTS], "first")],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )


def body() -> bytes:
    """Eight rows of one request: the run of a model that takes some milliseconds."""
    rows = 8
    data = np.random.default_rng(2).standard_normal(rows * INPUTS).round(3).tolist()
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, INPUTS], "data": data}]}).encode()


class Bench:
    """One platform and what was measured on it."""

    def __init__(self, server: Server, folder: Path, seconds: float) -> None:
        self.url = f"{server.url}/v2/models/slow/infer"
        self.server = server
        self.body = folder / "body.json"
        self.seconds = seconds
        self.values: dict[str, list[float]] = defaultdict(list)

    def key(self, tenant: str) -> str:
        with httpx.Client(trust_env=False, headers=self.server.headers) as http:
            answer = http.post(
                f"{self.server.url}/v1/keys", json={"tenant": tenant, "scopes": ["infer"], "name": tenant}
            )
            answer.raise_for_status()
            return str(answer.json()["key"])

    def _words(self, key: str, connections: int, seconds: float) -> list[str]:
        return [
            sys.executable, "-m", "bench.load", self.url, "--body", str(self.body), "--header", f"x-api-key:{key}",
            "--connections", str(connections), "--seconds", str(seconds),
        ]  # fmt: skip

    def load(self, name: str, key: str, connections: int) -> dict[str, Any]:
        words = self._words(key, connections, self.seconds)
        done = subprocess.run(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=False)
        report: dict[str, Any] = json.loads(done.stdout)
        for value in ("per_s", "p50_ms", "p99_ms"):
            self.values[f"{name} {value}"].append(report[value])
        say(f"{name}: {report['per_s']:,.0f}/s, p50 {report['p50_ms']:.1f} ms, p99 {report['p99_ms']:.1f} ms")
        return report

    @contextmanager
    def flood(self, key: str, connections: int) -> Iterator[None]:
        """Another tenant's load while the block runs; it began a second before."""
        words = self._words(key, connections, 600)
        with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
            try:
                self.settle(1.0, process)
                yield
            finally:
                process.kill()

    @staticmethod
    def settle(seconds: float, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise RuntimeError("the flood ended before it was measured")

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


def measure(bench: Bench, *, rounds: int, connections: int, flood: int) -> str:
    """Interleaved rounds; the table."""
    calm, wild = bench.key("calm"), bench.key("flood")
    for _ in range(rounds):
        bench.load("alone", calm, connections)
        with bench.flood(wild, flood):
            bench.load("flooded", calm, connections)
        bench.load("flood alone", wild, flood)
    rows = [
        f"| {connections} connections, {what} | {bench.median(f'{name} per_s'):,.0f} "
        f"| {bench.median(f'{name} p50_ms'):.1f} | {bench.median(f'{name} p99_ms'):.1f} |"
        for name, what in (("alone", "alone"), ("flooded", f"beside a flood of {flood}"))
    ]
    ratios = [bench.median(f"flooded {value}") / bench.median(f"alone {value}") for value in ("p50_ms", "p99_ms")]
    return "\n".join(
        [
            "| calm tenant | requests/s | p50 ms | p99 ms |",
            "|---|---:|---:|---:|",
            *rows,
            f"| ratio | | {ratios[0]:.2f} x | {ratios[1]:.2f} x |",
            "",
            f"The flood alone: {bench.median('flood alone per_s'):,.0f} requests/s.",
        ]
    )


def main() -> int:
    """Print the table; 1 when the flood raises the other's p99 by a factor of two or more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--flood", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tether-fairness-") as name, tether_platform(given.workers) as server:
        folder = Path(name)
        slow_model(folder / "slow.onnx")
        push(server, "slow", folder / "slow.onnx")
        bench = Bench(server, folder, given.seconds)
        bench.body.write_bytes(body())
        print(measure(bench, rounds=given.rounds, connections=given.connections, flood=given.flood))
    return 1 if bench.median("flooded p99_ms") >= 2 * bench.median("alone p99_ms") else 0


if __name__ == "__main__":
    raise SystemExit(main())
