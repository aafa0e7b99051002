"""The chunk store beside nats-py's own object store: MB/s of push and pull into a file, and what a small change moves.

Each has a broker of the same build and settings, which begins every round anew in an empty folder; rounds alternate, and theirs
asks for no permissions. Ours hashes every chunk on its way in, and every chunk and the whole file on its way out; theirs hashes the
whole on both. Run with ``python -m bench.store``.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import nats
import numpy as np
import uvloop

from tether.broker.embedded_server import EmbeddedServer, find_server
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.process.os_process import KEEP_MB, limit_malloc_arenas
from tether.settings import Settings
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.model_files import download
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform

PART = 1 << 18


def make_file(path: Path, size: int) -> None:
    """Random float32 weights: what models are made of, and what no compression helps."""
    rng = np.random.default_rng(7)
    with path.open("wb") as file:
        for start in range(0, size, 16 << 20):
            count = min(16 << 20, size - start) // 4
            file.write(rng.standard_normal(count, dtype=np.float32).tobytes())


def change(source: Path, target: Path, share: float) -> None:
    """A copy in which ``share`` of the bytes differ: half of them overwritten in one place, half put into the middle."""
    content = bytearray(source.read_bytes())
    rng = np.random.default_rng(8)
    half = int(len(content) * share / 2)
    content[half : 2 * half] = rng.bytes(half)
    middle = len(content) // 2
    content[middle:middle] = rng.bytes(half)
    target.write_bytes(content)


async def parts(path: Path) -> AsyncIterator[bytes]:
    """A body as the gateway receives it."""
    with path.open("rb") as file:
        while part := file.read(PART):
            yield part


def have_pages(folder: Path, size: int) -> None:
    """Write a file and remove it, so that the machine has the pages that are written next.

    A virtual machine that gives free memory back to its host pays for each page that it gets anew, up to ten times what writing
    to it costs: the more, the longer it rested, and whoever is measured second would have the pages of the first.
    """
    path, block = folder / "pages", bytes(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(2 * size >> 20):
            file.write(block)
    path.unlink()


async def ours(bus: Bus, bucket: str, path: Path, target: Path) -> tuple[float, float]:
    """Seconds to push and to pull."""
    store = ObjectChunkStore(bus, bucket)
    have_pages(target.parent, path.stat().st_size)
    began = time.perf_counter()
    file, _ = await upload(bus, store, parts(path), limit=1 << 40)
    pushed = time.perf_counter() - began
    have_pages(target.parent, path.stat().st_size)
    began = time.perf_counter()
    await download(store, file, target)
    return pushed, time.perf_counter() - began


async def theirs(objects: nats.js.object_store.ObjectStore, path: Path, target: Path) -> tuple[float, float]:
    """The same through nats-py's object store."""
    have_pages(target.parent, path.stat().st_size)
    with path.open("rb") as file:
        began = time.perf_counter()
        await objects.put("bench", file)
        pushed = time.perf_counter() - began
    have_pages(target.parent, path.stat().st_size)
    with target.open("wb") as out:
        began = time.perf_counter()
        await objects.get("bench", writeinto=out)
        return pushed, time.perf_counter() - began


@dataclasses.dataclass
class Times:
    """Seconds of every round, and the most memory (MB) this process had used before and at the end of the first one."""

    base_mb: float = 0.0
    peak_mb: float = 0.0

    push: list[float] = dataclasses.field(default_factory=list)
    pull: list[float] = dataclasses.field(default_factory=list)


async def measure(size: int, rounds: int) -> str:
    """The table."""
    own, other = Times(), Times()
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as name:
        folder = Path(name)
        make_file(folder / "model", size)
        for _ in range(rounds):
            with room(folder) as place:
                await own_round(place, folder / "model", own)
            with room(folder) as place:
                await other_round(place, folder / "model", other)
        with room(folder) as place:
            delta = await small_change(place, folder / "model")
    return table(size, own, other, delta)


@contextmanager
def room(folder: Path) -> Iterator[Path]:
    """A folder for one round, which goes with everything in it."""
    place = folder / "round"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


@asynccontextmanager
async def platform(place: Path, size: int) -> AsyncIterator[Bus]:
    """A broker of ours with room for some files of ``size`` bytes, and a gateway's connection to it."""
    home = Home.at(str(place / "home"))
    create_home(home, workers=1)
    settings = Settings(home=str(home.root), max_file_mb=max(20480, 4 * size >> 20))
    async with EmbeddedServer(home, settings, binary=find_server(settings)) as server:
        settings = dataclasses.replace(settings, nats_url=server.url)
        async with connect(settings, home, "dispatcher") as admin:
            await ensure_platform(admin, settings)
        async with connect(settings, home, "gateway") as bus:
            yield bus


@contextmanager
def open_broker(place: Path) -> Iterator[str]:
    """A server that lets everybody in, with the sync interval of ours; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = place / "open.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\nmax_payload: 8MB\n'
        f'jetstream {{ store_dir: "{place / "open"}", max_mem: 1GB, max_file: 40GB, sync_interval: 1s }}\n'
    )
    server = subprocess.Popen([find_server(Settings()).path, "-c", config], stderr=subprocess.DEVNULL)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


async def own_round(place: Path, model: Path, times: Times) -> None:
    """One push and one pull of ours, on a broker that is new."""
    async with platform(place, model.stat().st_size) as bus:
        times.base_mb = times.base_mb or most_memory()
        pushed, pulled = await ours(bus, bus.names.partition_bucket(0), model, place / "pulled")
        times.push.append(pushed)
        times.pull.append(pulled)
        times.peak_mb = times.peak_mb or most_memory()


async def other_round(place: Path, model: Path, times: Times) -> None:
    """The same of nats-py's."""
    with open_broker(place) as url:
        client = await nats.connect(url, error_cb=still_starting)
        try:
            objects = await client.jetstream().create_object_store("bench")
            pushed, pulled = await theirs(objects, model, place / "pulled")
        finally:
            await client.close()
    times.push.append(pushed)
    times.pull.append(pulled)


async def still_starting(_: Exception) -> None:
    """A broker that does not answer yet is asked again."""


def most_memory() -> float:
    """MB that this process has used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def small_change(place: Path, model: Path) -> float:
    """Share of a changed file's bytes that a push stores, when 1 % of them changed."""
    async with platform(place, model.stat().st_size) as bus:
        store = ObjectChunkStore(bus, bus.names.partition_bucket(0))
        await upload(bus, store, parts(model), limit=1 << 40)
        change(model, place / "changed", 0.01)
        file, stored = await upload(bus, store, parts(place / "changed"), limit=1 << 40)
        return stored / file.size


def table(size: int, own: Times, other: Times, delta: float) -> str:
    """Markdown."""
    mb = size / (1 << 20)
    rows = ["| | this store | nats-py's object store | ratio |", "|---|---|---|---|"]
    for name, mine, its in (("push", own.push, other.push), ("pull into a file", own.pull, other.pull)):
        fast, slow = mb / statistics.median(mine), mb / statistics.median(its)
        rows.append(f"| {name}, MB/s | {fast:.0f} | {slow:.0f} | {fast / slow:.1f} x |")
    rows.append(f"| bytes stored when 1 % changed | {delta:.2%} | 100 % | |")
    rows.append(f"| memory above the process's own, MB | {own.peak_mb - own.base_mb:.0f} | | |")
    return f"{mb:.0f} MB of random float32, medians of {len(own.push)} alternating rounds\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=512, help="size of the model file")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    given = parser.parse_args()
    limit_malloc_arenas(KEEP_MB)  # as gateways do
    print(uvloop.run(measure(given.mb << 20, given.rounds)))


if __name__ == "__main__":
    main()
