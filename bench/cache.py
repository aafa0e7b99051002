"""What a worker's cache of chunks costs and saves: MB/s of a fetch without it, into it and out of it, and what a small change moves.

Memory is that of this process above what it had before the fetch, as the kernel counts the peak. Run with ``python -m bench.cache``.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import uvloop

from bench.store import change, make_file, parts
from tether.broker.embedded_server import EmbeddedServer, find_server
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.domain.manifest import Batching, Manifest, ModelFile, ModelRef
from tether.identity.keys import create_home
from tether.process import metrics
from tether.process.data_dir import Home, private_folder
from tether.settings import Settings
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform
from tether.worker.files.version_files import WorkerFiles

MODEL = "bench"


class Memory:
    """Most MB of this process since it was made, above what it had then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._base = _kb("VmRSS")

    @property
    def peak_mb(self) -> float:
        return (_kb("VmHWM") - self._base) / 1024


def _kb(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def version(number: int, file: ModelFile) -> tuple[ModelRef, Manifest]:
    """A version of one file, as the model store would describe it."""
    manifest = Manifest(MODEL, number, "onnxruntime_onnx", (file,), (), (), Batching(), 0.0, "bench")
    return ModelRef(MODEL, number), manifest


def moved() -> float:
    """Bytes that came from the broker so far."""
    return float(metrics.CHUNKS_BYTES.labels("broker")._value.get())  # noqa: SLF001 - the library has no reader


@dataclasses.dataclass
class Times:
    """Seconds of each way, for each round, the share a small change moved, and MB of memory."""

    without: list[float] = dataclasses.field(default_factory=list)
    into: list[float] = dataclasses.field(default_factory=list)
    kept: list[float] = dataclasses.field(default_factory=list)
    out_of: list[float] = dataclasses.field(default_factory=list)
    changed: list[float] = dataclasses.field(default_factory=list)
    share: float = 0.0
    peak_mb: float = 0.0


async def fetch(files: WorkerFiles, number: int, file: ModelFile) -> float:
    """Seconds of one fetch into a folder that is not there yet."""
    ref, manifest = version(number, file)
    began = time.perf_counter()
    directory = await files.fetch(ref, manifest)
    took = time.perf_counter() - began
    files.release(ref)
    if (directory / file.path).stat().st_size != file.size:
        raise RuntimeError("the file is not whole")
    return took


async def one_round(bus: Bus, folder: Path, first: ModelFile, second: ModelFile, times: Times) -> None:
    """Each way once; assembled files are deleted in between, the cache of chunks is not."""
    bare = dataclasses.replace(bus.settings, chunk_cache_mb=0)
    plain, bus.settings = bus.settings, bare
    place = folder / "bare"
    private_folder(place)
    times.without.append(await fetch(WorkerFiles(bus, place), 1, first))
    shutil.rmtree(place)
    bus.settings = plain
    place = folder / "cached"
    private_folder(place)
    files = WorkerFiles(bus, place)
    memory = Memory()
    times.into.append(await fetch(files, 1, first))
    ref, manifest = version(1, first)
    directory = await files.fetch(ref, manifest)
    began = time.perf_counter()
    await files.remember(manifest, directory)
    times.kept.append(time.perf_counter() - began)
    before = moved()
    times.changed.append(await fetch(files, 2, second))
    times.share = max(times.share, (moved() - before) / second.size)
    files.release(ref)
    shutil.rmtree(directory)
    before = moved()
    times.out_of.append(await fetch(files, 1, first))
    times.peak_mb = max(times.peak_mb, memory.peak_mb)
    if moved() != before:
        raise RuntimeError("not all came from the cache")
    await files.close()
    shutil.rmtree(place)


async def measure(size: int, rounds: int) -> str:
    """The table."""
    times = Times()
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as name:
        folder = Path(name)
        home = Home.at(str(folder / "home"))
        create_home(home, workers=1)
        settings = Settings(home=str(home.root), max_file_mb=max(20480, 16 * size >> 20))
        make_file(folder / "model", size)
        change(folder / "model", folder / "changed", 0.01)
        async with EmbeddedServer(home, settings, binary=find_server(settings)) as server:
            settings = dataclasses.replace(settings, nats_url=server.url)
            async with connect(settings, home, "dispatcher") as admin:
                await ensure_platform(admin, settings)
            async with connect(settings, home, "gateway") as bus:
                store = ObjectChunkStore(bus, bus.names.chunk_bucket(MODEL))
                first, _ = await upload(bus, store, parts(folder / "model"), limit=1 << 40, whole=True)
                second, _ = await upload(bus, store, parts(folder / "changed"), limit=1 << 40, whole=True)
            async with connect(settings, home, "worker-1") as bus:
                for _ in range(rounds):
                    await one_round(bus, folder, first, second, times)
    return table(size, times)


def table(size: int, times: Times) -> str:
    """Markdown."""
    mb = size / (1 << 20)
    rows = ["| | |", "|---|---:|"]
    for name, seconds in (
        ("fetch without a cache, MB/s", times.without),
        ("first fetch with one, MB/s", times.into),
        ("its chunks put into the cache afterwards, MB/s", times.kept),
        ("fetch of a version in which 1 % changed, MB/s", times.changed),
        ("fetch out of the cache, MB/s", times.out_of),
    ):
        rows.append(f"| {name} | {mb / statistics.median(seconds):.0f} |")
    rows.append(f"| bytes from the broker when 1 % changed | {times.share:.2%} |")
    rows.append(f"| memory of this process above its base at most, MB | {times.peak_mb:.0f} |")
    return f"{mb:.0f} MB of random float32, medians of {len(times.into)} rounds\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=512, help="size of the model file")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    given = parser.parse_args()
    print(uvloop.run(measure(given.mb << 20, given.rounds)))


if __name__ == "__main__":
    main()
