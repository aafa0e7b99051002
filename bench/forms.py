"""What it costs to store a model's pieces encrypted: MB/s of push and pull into a file, in memory, beside the plain form.

Alternating rounds on one broker; every round starts with nothing stored. Run with ``python -m bench.forms``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from bench.store import make_file, parts
from tether.bus.chunks import ObjectChunkStore
from tether.bus.connection import Bus
from tether.bus.keys import create_home
from tether.bus.model_files import download
from tether.bus.sealed_chunks import SealedChunkStore
from tether.bus.server import EmbeddedServer, find_server
from tether.bus.topology import ensure_platform
from tether.bus.upload import upload
from tether.envelope.model_seal import PieceSeal
from tether.envelope.sealing import new_data_key
from tether.home import Home
from tether.settings import Settings

MODEL = "bench"
Store = ObjectChunkStore | SealedChunkStore


@dataclasses.dataclass
class Times:
    """Seconds of every round."""

    push: list[float] = dataclasses.field(default_factory=list)
    pull: list[float] = dataclasses.field(default_factory=list)


def forms(bus: Bus) -> dict[str, Callable[[], Store]]:
    """Ways to store pieces; each call makes a store in which nothing of a file is stored in that way."""
    bucket = bus.names.chunk_bucket(MODEL)
    return {
        "plain": lambda: ObjectChunkStore(bus, bucket),
        "encrypted": lambda: SealedChunkStore(bus, bucket, PieceSeal(new_data_key(1), MODEL)),
    }


async def one(bus: Bus, store: Store, source: Path, target: Path, times: Times) -> None:
    began = time.perf_counter()
    file, stored = await upload(bus, store, parts(source), limit=1 << 40)
    times.push.append(time.perf_counter() - began)
    if stored != file.size:
        raise SystemExit("something was stored before")
    began = time.perf_counter()
    await download(store, file, target)
    times.pull.append(time.perf_counter() - began)
    if isinstance(store, ObjectChunkStore):
        for digest in file.chunks:
            await store.discard(digest)


async def measure(size: int, rounds: int) -> str:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as name:
        folder = Path(name)
        home = Home.at(str(folder / "home"))
        create_home(home, workers=1)
        settings = Settings(home=str(home.root), max_file_mb=max(20480, 16 * (rounds + 1) * size >> 20))
        make_file(folder / "model", size)
        async with EmbeddedServer(home, settings, binary=find_server(settings)) as server:
            settings = dataclasses.replace(settings, nats_url=server.url)
            async with (
                Bus.connect(settings, home, "dispatcher") as admin,
                Bus.connect(settings, home, "gateway") as bus,
            ):
                await ensure_platform(admin, settings)
                every = {form: Times() for form in forms(bus)}
                for _ in range(rounds):
                    for form, make in forms(bus).items():
                        await one(bus, make(), folder / "model", folder / "pulled", every[form])
    return table(size, every)


def table(size: int, every: dict[str, Times]) -> str:
    """Markdown."""
    mb = size / (1 << 20)
    rows = ["| pieces | push, MB/s | pull into a file, MB/s |", "|---|---:|---:|"]
    for form, times in every.items():
        push, pull = (mb / statistics.median(found) for found in (times.push, times.pull))
        rows.append(f"| {form} | {push:.0f} | {pull:.0f} |")
    rounds = len(next(iter(every.values())).push)
    busy = f"load average {os.getloadavg()[0]:.0f}"
    return f"{mb:.0f} MB of random float32, medians of {rounds} alternating rounds, {busy}\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="size of the model file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each")
    given = parser.parse_args()
    print(uvloop.run(measure(given.mb << 20, given.rounds)))


if __name__ == "__main__":
    main()
