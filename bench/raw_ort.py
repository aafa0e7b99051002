"""ONNX Runtime alone, in this process: the ceiling of what one thread can do with the digits model."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.fastapi_server import MODEL


def measure(seconds: float, rows: int) -> dict[str, float]:
    """Calls a second and latency in ms of ``session.run`` with ``rows`` rows at a time, in one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = ort.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    feeds = {"image": np.random.default_rng(7).uniform(0, 16, (rows, 64)).astype(np.float32)}
    for _ in range(100):
        session.run(None, feeds)
    latencies: list[float] = []
    began = before = time.perf_counter()
    while before - began < seconds:
        session.run(None, feeds)
        after = time.perf_counter()
        latencies.append(after - before)
        before = after
    latencies.sort()
    return {
        "per_s": len(latencies) * rows / (before - began),
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(measure(given.seconds, given.rows)))


if __name__ == "__main__":
    main()
