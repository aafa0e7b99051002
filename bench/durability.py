"""What the durability profile ``durable`` costs beside ``fast``: two platforms on one disk, measured in turns.

Durable jobs a second end to end in batches; the latency of submitting one job, alone and from many clients at once, and how many a
second that makes; synchronous inference. Beside them what one ``fdatasync`` of 4 KB costs on that disk. Run with
``python -m bench.durability``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import numpy as np

from bench import durable
from bench.servers import Server, tether_platform

PROFILES = ("fast", "durable")
CLIENTS = 32

Measured = dict[str, list[float]]
"""By what was measured its value in each round."""


def synced_ms(folder: Path, count: int = 200) -> float:
    """Milliseconds of writing 4 KB at the end of a file and syncing it: the median."""
    found = []
    path = folder / "synced"
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            found.append(time.perf_counter() - began)
    path.unlink()
    return statistics.median(found) * 1000


def body(row: list[float]) -> dict[str, object]:
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": row}]}


async def submits(server: Server, row: list[float], clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies in seconds of single submits by so many clients, each after its last answer, and how many a second."""
    end, found = time.perf_counter() + seconds, list[float]()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=server.url, headers=server.headers, trust_env=False, timeout=60) as http:
            while time.perf_counter() < end:
                began = time.perf_counter()
                answer = await http.post("/v1/jobs", json={"model": "digits", **body(row)})
                answer.raise_for_status()
                found.append(time.perf_counter() - began)

    await asyncio.gather(*[client() for _ in range(clients)])
    return found, len(found) / seconds


async def infers(server: Server, row: list[float], seconds: float) -> float:
    """Median latency of synchronous inference by one client, in milliseconds."""
    found, end = list[float](), time.perf_counter() + seconds
    async with httpx.AsyncClient(headers=server.headers, trust_env=False, timeout=60) as http:
        while time.perf_counter() < end:
            began = time.perf_counter()
            (await http.post(server.infer_url, json=body(row))).raise_for_status()
            found.append(time.perf_counter() - began)
    return statistics.median(found) * 1000


async def measure(server: Server, row: list[float], jobs: int, seconds: float, into: Measured) -> None:
    """One round."""
    report = await durable.measure(server, row, jobs)
    into["jobs/s accepted, batches"].append(report.accepted)
    into["jobs/s done, batches"].append(report.done)
    alone, _ = await submits(server, row, 1, seconds)
    into["submit, one client, p50 ms"].append(float(np.percentile(alone, 50)) * 1000)
    into["submit, one client, p99 ms"].append(float(np.percentile(alone, 99)) * 1000)
    many, rate = await submits(server, row, CLIENTS, seconds)
    into[f"submit, {CLIENTS} clients, p50 ms"].append(float(np.percentile(many, 50)) * 1000)
    into[f"submit, {CLIENTS} clients, p99 ms"].append(float(np.percentile(many, 99)) * 1000)
    into[f"submits/s, {CLIENTS} clients"].append(rate)
    into["infer, one client, p50 ms"].append(await infers(server, row, seconds))


def table(found: dict[str, Measured], sync_ms: float) -> str:
    """Medians of all rounds, and the median of each round's ratio."""
    lines = [
        f"one fdatasync of 4 KB: {sync_ms:.2f} ms",
        "",
        "| | fast | durable | durable / fast |",
        "|---|---|---|---|",
    ]
    for what, fast in found["fast"].items():
        synced = found["durable"][what]
        ratio = statistics.median(b / a for a, b in zip(fast, synced, strict=True))
        lines.append(f"| {what} | {statistics.median(fast):.4g} | {statistics.median(synced):.4g} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    row = [float(value) for value in np.random.default_rng(3).random(64, dtype=np.float32)]
    found: dict[str, Measured] = {profile: defaultdict(list) for profile in PROFILES}
    with tether_platform(durability="fast") as fast, tether_platform(durability="durable") as synced:
        servers = {"fast": fast, "durable": synced}
        for number in range(options.rounds + 1):
            # the first round warms up
            into = found if number else {profile: defaultdict(list) for profile in PROFILES}
            for profile in PROFILES if number % 2 else PROFILES[::-1]:
                asyncio.run(measure(servers[profile], row, options.jobs, options.seconds, into[profile]))
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as folder:
        print(table(found, synced_ms(Path(folder))))


if __name__ == "__main__":
    main()
