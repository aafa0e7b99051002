"""What a kept job costs the broker: bytes on its disk, and memory, for each of many jobs that have ended.

Records, results and notes of attempts are stored as gateways and workers store them, at a steady rate in chunks, into a broker
under the platform's own configuration; no model runs. Memory is the broker's resident set, taken when each chunk is stored; the
growth after the second chunk counts, when caches and the index of what was stored in the last two minutes are as large as they get. Run with ``python -m bench.kept_jobs``.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import psutil
import uvloop

from tether.broker.embedded_server import EmbeddedServer
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.job import (
    JobId,
    JobRecord,
    JobState,
    Outcome,
    Priority,
    idempotency_digest,
    new_durable_job_id,
    new_job_id,
    new_keyed_job_id,
)
from tether.domain.tensor import Tensor
from tether.gateway_http.jobs.records import JobRecordStore
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.streams.job_queue import BusResults
from tether.streams.layout import ensure_platform
from tether.wire import codec

_AT_ONCE = 64
_OUTPUT = Tensor("y", "FP32", (1, 4), bytes(16))


class Cost(msgspec.Struct):
    """Of one kept job. ``memory`` is bytes of the broker's resident set, the others bytes on disk."""

    record: float
    result: float
    memory: float


class _Keeper:
    """Stores jobs as they are once they have ended."""

    def __init__(self, gateway: Bus, worker: Bus) -> None:
        self._gateway = gateway
        self._worker = worker
        self._records = JobRecordStore(gateway)
        self._results = BusResults(worker)
        self._numbers = itertools.count()

    async def keep(self, count: int, rate: float) -> None:
        began = self._gateway.clock.monotonic()
        for start in range(0, count, _AT_ONCE):
            await asyncio.sleep(began + start / rate - self._gateway.clock.monotonic())
            await asyncio.gather(*[self._job() for _ in range(min(_AT_ONCE, count - start))])

    async def _job(self) -> None:
        """Every other one under an Idempotency-Key, which is stored twice."""
        number, now, bundle = next(self._numbers), self._gateway.clock.utc(), new_job_id()
        key = idempotency_digest("acme", f"nightly-{number}") if number % 2 else ""
        job = new_keyed_job_id(key) if key else new_durable_job_id("acme")
        digest = os.urandom(32).hex() if key else ""
        record = JobRecord(
            job, "acme", "digits", 1, Priority.NORMAL, now, now + 86400, digest, "", "req-0123456789abcdef"
        )
        if key:
            claim = await self._records.claim(record, bundle, 0)
            if claim is None:
                raise RuntimeError("a key of a fresh broker was taken")
            await self._records.accept(claim.record)
        else:
            await self._records.enter(record, bundle)
        await self._end(job, now)

    async def _end(self, job: JobId, now: float) -> None:
        outcome = Outcome(job, JobState.SUCCEEDED, (_OUTPUT,), None, 1, "worker-1", now, now)
        subject, body = self._worker.names.result(job), codec.encode_outcomes([outcome])
        frame = self._worker.signer.sign_envelope(MessageType.RESULT, subject, body, jobs=(job,), attempt=1)
        await self._results.commit(job, frame)


async def measure(home: Home, jobs: int, rate: float, *, chunks: int = 5) -> Cost:
    """What each of ``jobs`` kept jobs costs a new broker in ``home``."""
    settings = Settings(home=str(home.root))
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(home, settings))
        settings = dataclasses.replace(settings, nats_url=server.url)
        dispatcher, gateway, worker = [
            await stack.enter_async_context(connect(settings, home, name))
            for name in ("dispatcher", "gateway", "worker-1")
        ]
        await ensure_platform(dispatcher, settings)
        keeper, broker = _Keeper(gateway, worker), psutil.Process(server.pid)
        sizes = []
        for _ in range(chunks):
            await keeper.keep(jobs // chunks, rate)
            sizes.append(broker.memory_info().rss)
            print(f"{jobs // chunks * len(sizes)} jobs: {sizes[-1] / 1e6:.0f} MB")
        names = dispatcher.names
        states = [
            (await dispatcher.api(f"STREAM.INFO.{stream}"))["state"]
            for stream in (names.bucket_stream("jobs"), names.results_stream)
        ]
    record, result = (state["bytes"] / state["messages"] for state in states)
    grown = (sizes[-1] - sizes[1]) / (jobs // chunks * (chunks - 2))
    return Cost(record, result, grown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400_000)
    parser.add_argument("--rate", type=float, default=800.0, help="jobs a second")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as folder:
        home = Home.at(str(Path(folder)))
        create_home(home, workers=1)
        cost = uvloop.run(measure(home, given.jobs, given.rate))
    print(
        f"a job's record takes {cost.record:.0f} bytes on disk, its result {cost.result:.0f} with 16 bytes of outputs"
    )
    print(
        f"the broker's memory grew by {cost.memory / 1000:.2f} MB for 1,000 kept jobs ({given.jobs} jobs, {given.rate:g} a second)"
    )


if __name__ == "__main__":
    main()
