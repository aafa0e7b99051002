"""Durable jobs end to end: submitted in batches over HTTP, queued on disk, run, their results recorded and read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from bench.servers import Server

SUBMIT = 200
"""Jobs of one submitting request."""
ASK = 200
"""Jobs of one waiting request; the interface's limit."""
CLIENTS = 4


@dataclass(frozen=True)
class JobsReport:
    """Jobs a second: ``accepted`` until the last was accepted, ``done`` until the last result was read."""

    jobs: int
    accepted: float
    done: float


async def measure(server: Server, row: list[float], jobs: int) -> JobsReport:
    """Run ``jobs`` jobs of one row each, submitted and awaited by a few clients at once.

    Raises:
        RuntimeError: a job did not succeed, or the counts do not agree.
    """
    job = {"model": "digits", "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": row}]}
    body = msgspec.json.encode({"jobs": [job] * SUBMIT})
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(
        base_url=server.url, headers=server.headers, trust_env=False, timeout=90, limits=limits
    ) as http:
        gate = asyncio.Semaphore(CLIENTS)
        began = time.perf_counter()
        batches = await asyncio.gather(*(_submit(http, gate, body) for _ in range(jobs // SUBMIT)))
        accepted = time.perf_counter() - began
        states = await asyncio.gather(*(_states(http, gate, ids) for ids in batches))
        done = time.perf_counter() - began
    counted = Counter(state for group in states for state in group)
    total = sum(map(len, batches))
    if counted != {"succeeded": total}:
        raise RuntimeError(f"{total} jobs were accepted, but ended so: {dict(counted)}")
    return JobsReport(total, total / accepted, total / done)


async def _submit(http: httpx.AsyncClient, gate: asyncio.Semaphore, body: bytes) -> list[str]:
    async with gate:
        answer = await http.post("/v1/jobs:batch", content=body, headers={"content-type": "application/json"})
    answer.raise_for_status()
    return [job["id"] for job in _jobs(answer)]


async def _states(http: httpx.AsyncClient, gate: asyncio.Semaphore, ids: list[str]) -> list[str]:
    """Final states of at most ASK jobs."""
    async with gate:
        answer = await http.get("/v1/jobs", params={"ids": ",".join(ids[:ASK]), "wait": "60"})
    answer.raise_for_status()
    return [job["state"] for job in _jobs(answer)]


def _jobs(answer: httpx.Response) -> list[dict[str, Any]]:
    content: dict[str, list[dict[str, Any]]] = msgspec.json.decode(answer.content)
    return content["jobs"]
