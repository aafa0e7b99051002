"""What the forms of a model's chunks cost and save: MB/s of push and of pull into a file, and the bytes that are stored.

Alternating rounds on one broker; every round starts with nothing stored. Run with ``python -m bench.forms``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import uvloop

from bench.store import parts
from tether.broker.embedded_server import EmbeddedServer, find_server
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto.model_encryption import ChunkSeal
from tether.crypto.payload_encryption import new_data_key
from tether.domain.chunking import Bytes, Cutter, compressed
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.storage.model_files import download
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform

MODEL = "bench"
DATA = ("float32", "bfloat16", "bfloat16 in float32")
"""Random weights; real ones compress better, since neighbours resemble one another."""

Store = ObjectChunkStore | SealedChunkStore


@dataclasses.dataclass
class Times:
    """Seconds of every round."""

    push: list[float] = dataclasses.field(default_factory=list)
    pull: list[float] = dataclasses.field(default_factory=list)


class Uncompressed(ObjectChunkStore):
    """As it was before there was compression."""

    async def _store(self, digest: str, chunk: Bytes) -> None:
        await self._send(digest, chunk, digest)


def forms(bus: Bus) -> dict[str, Callable[[], Store]]:
    """Ways to store chunks; each call makes a store in which nothing of a file is stored in that way."""
    bucket = bus.names.chunk_bucket(MODEL)
    return {
        "never compressed": lambda: Uncompressed(bus, bucket),
        "as they are stored": lambda: ObjectChunkStore(bus, bucket),
        "encrypted": lambda: SealedChunkStore(bus, bucket, ChunkSeal(new_data_key(1), MODEL)),
    }


def make_weights(path: Path, size: int, kind: str) -> None:
    """A file of random weights of one of the kinds of :data:`DATA`."""
    rng = np.random.default_rng(7)
    width = 2 if kind == "bfloat16" else 4
    with path.open("wb") as file:
        for start in range(0, size, 16 << 20):
            found = rng.standard_normal(min(16 << 20, size - start) // width, dtype=np.float32)
            if kind != "float32":
                found = found.astype(ml_dtypes.bfloat16)
            file.write(found.astype(np.float32).tobytes() if width == 4 else found.tobytes())


def stored_share(path: Path) -> float:
    """The part of a file's bytes that its chunks have as they are stored."""
    cutter, total = Cutter(), 0
    with path.open("rb") as file:
        while part := file.read(8 << 20):
            total += sum(len(compressed(chunk) or chunk) for _, chunk in cutter.cut((part,)))
    total += sum(len(compressed(chunk) or chunk) for _, chunk in cutter.cut((), last=True))
    return total / path.stat().st_size


async def one(bus: Bus, store: Store, source: Path, target: Path, times: Times) -> None:
    began = time.perf_counter()
    file, stored = await upload(bus, store, parts(source), limit=1 << 40, whole=True)
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
    rows = ["| weights | chunks | push, MB/s | pull into a file, MB/s | stored |", "|---|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as name:
        folder = Path(name)
        home = Home.at(str(folder / "home"))
        create_home(home, workers=1)
        needed = 16 * (rounds + 1) * len(DATA) * size >> 20
        settings = Settings(home=str(home.root), max_file_mb=max(20480, needed))
        async with EmbeddedServer(home, settings, binary=find_server(settings)) as server:
            settings = dataclasses.replace(settings, nats_url=server.url)
            async with (
                connect(settings, home, "dispatcher") as admin,
                connect(settings, home, "gateway") as bus,
            ):
                await ensure_platform(admin, settings)
                for kind in DATA:
                    make_weights(folder / "model", size, kind)
                    every = {form: Times() for form in forms(bus)}
                    for _ in range(rounds):
                        for form, make in forms(bus).items():
                            await one(bus, make(), folder / "model", folder / "pulled", every[form])
                    rows += lines(kind, size, every, stored_share(folder / "model"))
    busy = f"load average {os.getloadavg()[0]:.0f}"
    return f"{size >> 20} MB, medians of {rounds} alternating rounds, {busy}\n\n" + "\n".join(rows) + "\n"


def lines(kind: str, size: int, every: dict[str, Times], share: float) -> Iterator[str]:
    """Rows of the table."""
    for form, times in every.items():
        push, pull = (size / (1 << 20) / statistics.median(found) for found in (times.push, times.pull))
        stored = 1.0 if form == "never compressed" else share
        yield f"| {kind} | {form} | {push:.0f} | {pull:.0f} | {stored:.0%} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="size of the model file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each")
    given = parser.parse_args()
    print(uvloop.run(measure(given.mb << 20, given.rounds)))


if __name__ == "__main__":
    main()
