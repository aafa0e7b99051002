"""How long a worker takes from a version's manifest to its first answer, when what needs no files begins while they are
fetched and when it begins after that.

Both ways are the worker's own, in alternating rounds; each fetches into an empty folder, from a broker on this machine behind a
link of ``--mb-s``. Run with ``python -m bench.loading``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import uvloop

from bench.link import link
from bench.run import say
from bench.store import parts
from tether.broker.embedded_server import EmbeddedServer, find_server
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.domain.manifest import Batching, Manifest, ModelRef, TensorSpec
from tether.identity.keys import create_home
from tether.model.config import ModelConfig
from tether.process.data_dir import Home, private_folder
from tether.settings import Settings
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform
from tether.worker.files.version_files import WorkerFiles
from tether.worker.models.loader import Loader
from tether.worker.models.memory_budget import Memory

NAME = "bench"
WIDTH = 2048
_LAYER_MB = WIDTH * (WIDTH + 1) * 4 / (1 << 20)

ARCHITECTURE = f"""
import torch

class Layers(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear({WIDTH}, {WIDTH}) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return {{"y": x}}

def build(config):
    return Layers(config["layers"])
"""
INPUTS = (TensorSpec("x", "FP32", (1, WIDTH)),)
OUTPUTS = (TensorSpec("y", "FP32", (1, WIDTH)),)


class Took(NamedTuple):
    """Seconds of one load: until its files were there, until the copy was, until its first answer."""

    fetched: float
    loaded: float
    answered: float


@contextmanager
def architecture(folder: Path) -> Iterator[None]:
    """An installed package with an architecture, for this process and those it starts."""
    (folder / "tether_bench_layers.py").write_text(ARCHITECTURE)
    metadata = folder / "tether_bench_layers-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tether-bench-layers\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[tether.architectures]\nbench-layers = tether_bench_layers:build\n")
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def write_weights(folder: Path, layers: int) -> None:
    """A folder as it is pushed for ``pytorch_safetensors``."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(7)
    weights = {}
    for layer in range(layers):
        weights[f"layers.{layer}.weight"] = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH)
        weights[f"layers.{layer}.bias"] = rng.standard_normal(WIDTH, dtype=np.float32)
    save_file(weights, folder / "model.safetensors")
    axes = {"datatype": "FP32", "shape": [-1, WIDTH]}
    signature = {"inputs": [{"name": "x", **axes}], "outputs": [{"name": "y", **axes}]}
    described = {"architecture": "bench-layers", "config": {"layers": layers}, **signature}
    (folder / "model.json").write_text(json.dumps(described))


def write_exported(folder: Path, layers: int) -> None:
    """A program of ``torch.export``."""
    import torch

    built: Any = importlib.import_module("tether_bench_layers").build({"layers": layers})
    torch.export.save(torch.export.export(built.eval(), (torch.zeros(1, WIDTH),)), folder / "model.pt2")


WRITERS = {"pytorch_safetensors": write_weights, "pytorch_export": write_exported}


async def push(bus: Bus, folder: Path, platform: str) -> Manifest:
    """Store a folder's files; the manifest as the model store would write it."""
    store, files = ObjectChunkStore(bus, bus.names.chunk_bucket(NAME)), []
    for path in sorted(folder.iterdir()):
        file, _ = await upload(bus, store, parts(path), limit=1 << 40)
        files.append(msgspec.structs.replace(file, path=path.name))
    return Manifest(NAME, 1, platform, tuple(files), INPUTS, OUTPUTS, Batching(), 0.0, "bench")


async def load(bus: Bus, place: Path, manifest: Manifest, *, ahead: bool) -> Took:
    """Once, as a worker does it."""
    private_folder(place)
    files, ref = WorkerFiles(bus, place), ModelRef(manifest.name, manifest.version)
    began = time.perf_counter()
    directory = await files.place(ref, manifest)
    loader = Loader(bus, manifest, directory, ModelConfig(NAME), Memory(0, list))
    if ahead:
        loader.prepare()
    try:
        await files.fetch(ref, manifest)
        fetched = time.perf_counter() - began
        generation = await loader.load()
    finally:
        await loader.abort()
    loaded = time.perf_counter() - began
    (found,) = generation.runtimes[0].run({"x": np.zeros((1, WIDTH), np.float32)}, ())
    answered = time.perf_counter() - began
    await generation.end(0)
    await files.close()
    shutil.rmtree(place)
    if found.shape != (1, WIDTH):
        raise RuntimeError("that is no answer of this model")
    return Took(fetched, loaded, answered)


async def measure(size_mb: int, rounds: int, platforms: list[str], mb_s: float) -> str:
    """The tables."""
    tables = [f"A link of {mb_s:g} MB/s.\n"]
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as name, architecture(Path(name)):
        folder = Path(name)
        home = Home.at(str(folder / "home"))
        create_home(home, workers=1)
        settings = Settings(home=str(home.root), max_file_mb=max(20480, 16 * size_mb), chunk_cache_mb=0)
        async with EmbeddedServer(home, settings, binary=find_server(settings)) as server:
            settings = dataclasses.replace(settings, nats_url=server.url)
            async with connect(settings, home, "dispatcher") as admin:
                await ensure_platform(admin, settings)
            for platform in platforms:
                (folder / platform).mkdir()
                WRITERS[platform](folder / platform, max(1, round(size_mb / _LAYER_MB)))
                async with connect(settings, home, "gateway") as bus:
                    manifest = await push(bus, folder / platform, platform)
                with link(server.url, mb_s) as url:
                    async with connect(dataclasses.replace(settings, nats_url=url), home, "worker-1") as bus:
                        found = await alternate(bus, folder / "cache", manifest, rounds)
                tables.append(table(manifest, found))
    return "\n".join(tables)


async def alternate(bus: Bus, place: Path, manifest: Manifest, rounds: int) -> Mapping[bool, list[Took]]:
    """Both ways in turn, after one round that nobody counts; which comes first changes."""
    found: dict[bool, list[Took]] = {False: [], True: []}
    await load(bus, place, manifest, ahead=True)
    for number in range(rounds):
        for ahead in (bool(number % 2), not number % 2):
            took = await load(bus, place, manifest, ahead=ahead)
            say(f"{manifest.platform}, {'meanwhile' if ahead else 'afterwards'}: {took.answered:.2f} s")
            found[ahead].append(took)
    return found


def table(manifest: Manifest, found: Mapping[bool, list[Took]]) -> str:
    """Markdown."""
    rows = ["| seconds from the manifest until | afterwards | meanwhile | ratio |", "|---|---:|---:|---:|"]
    for field, what in (
        ("fetched", "the files are there"),
        ("loaded", "it is loaded"),
        ("answered", "the first answer"),
    ):
        old, new = ([getattr(took, field) for took in found[ahead]] for ahead in (False, True))
        ratio = statistics.median(after / before for before, after in zip(old, new, strict=True))
        rows.append(f"| {what} | {statistics.median(old):.2f} | {statistics.median(new):.2f} | {ratio:.2f} |")
    head = f"{manifest.platform}, {manifest.size >> 20} MB, medians of {len(found[True])} alternating rounds"
    return f"{head}\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mb", type=int, default=400, help="size of the model's files")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way")
    parser.add_argument("--mb-s", type=float, default=119.0, help="width of the broker's link; 119 is 1 Gbit/s")
    parser.add_argument("--platform", choices=sorted(WRITERS), action="append", help="only this one; may be repeated")
    given = parser.parse_args()
    print(uvloop.run(measure(given.mb, given.rounds, given.platform or list(WRITERS), given.mb_s)))


if __name__ == "__main__":
    main()
