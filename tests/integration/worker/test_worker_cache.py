"""Where a worker's model files come from: the broker, its cache of chunks, its disk; and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.models import models
from support.platform.disks import small_disk
from support.platform.services import TENANT, Services, new_job, services

from bench.cache import Times, one_round
from bench.store import change, make_file
from bench.store import parts as parts_of
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.domain.manifest import Batching, Manifest, ModelFile, ModelRef
from tether.errors import CorruptChunk, Unavailable
from tether.gateway_http.api.routes.workers import heartbeats
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.process.data_dir import Home, private_folder
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.model_files import version_digest
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform
from tether.worker.files.version_files import WorkerFiles

log = logging.getLogger(__name__)

MB = 1 << 20


async def parts(content: bytes) -> AsyncIterator[bytes]:
    yield content


def moved(source: str = "broker") -> float:
    return float(metrics.CHUNKS_BYTES.labels(source)._value.get())


def lost(reason: str) -> float:
    return float(metrics.CHUNK_CACHE_LOST.labels(reason)._value.get())


@dataclasses.dataclass
class Place:
    """A worker's connection, a folder for its files, and a store to fetch from."""

    bus: Bus
    gateway: Bus
    folder: Path
    uploaded: int = 0

    @property
    def store(self) -> ObjectChunkStore:
        return ObjectChunkStore(self.gateway, self.gateway.names.chunk_bucket("m"))

    def files(self, **changes: int) -> WorkerFiles:
        self.bus.settings = dataclasses.replace(self.bus.settings, cache_reserve_mb=0)
        self.bus.settings = dataclasses.replace(self.bus.settings, **changes)  # type: ignore[arg-type]
        private_folder(self.folder)
        return WorkerFiles(self.bus, self.folder)

    async def version(self, content: bytes) -> tuple[ModelRef, Manifest]:
        """A version with this file, as a model store would describe it."""
        file, _ = await upload(self.gateway, self.store, parts(content), limit=1 << 30, whole=True)
        self.uploaded += 1
        manifest = Manifest("m", self.uploaded, "onnxruntime_onnx", (file,), (), (), Batching(), 0.0, "test")
        return ModelRef("m", self.uploaded), manifest


@pytest.fixture
async def place(broker: Broker, tmp_path: Path) -> AsyncIterator[Place]:
    async with connect(broker.settings, broker.home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
        async with (
            connect(broker.settings, broker.home, "gateway") as gateway,
            connect(broker.settings, broker.home, "worker-1") as bus,
        ):
            yield Place(bus, gateway, tmp_path / "cache")


async def alter(bus: Bus, model: str, digest: str, content: bytes = b"evil") -> None:
    """Write other bytes where a chunk lies."""
    await bus.publish_acked(bus.names.object_chunk(bus.names.chunk_bucket(model), digest), content)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


async def test_a_small_change_moves_little_and_a_fetch_needs_little_memory(place: Place, tmp_path: Path) -> None:
    make_file(tmp_path / "model", 256 * MB)
    change(tmp_path / "model", tmp_path / "changed", 0.01)
    store = ObjectChunkStore(place.gateway, place.gateway.names.chunk_bucket("bench"))
    first, _ = await upload(place.gateway, store, parts_of(tmp_path / "model"), limit=1 << 30, whole=True)
    second, _ = await upload(place.gateway, store, parts_of(tmp_path / "changed"), limit=1 << 30, whole=True)
    times = Times()
    await one_round(place.bus, tmp_path, first, second, times)
    log.info("%.2f %% moved, %.0f MB of memory", 100 * times.share, times.peak_mb)
    assert times.share <= 0.03
    assert times.peak_mb < 200


async def test_what_was_fetched_is_read_from_the_cache_and_without_it_fetched_again(place: Place) -> None:
    content = noise(12 * MB)
    ref, manifest = await place.version(content)
    files = place.files()
    directory = await files.fetch(ref, manifest)
    await files.remember(manifest, directory)
    shutil.rmtree(directory)
    before = moved("broker"), moved("cache")
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    assert (moved("broker"), moved("cache")) == (before[0], before[1] + len(content))
    await files.close()
    shutil.rmtree(place.folder)
    files = place.files()
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    assert moved("broker") == before[0] + len(content)
    await files.close()


async def test_a_damaged_cache_costs_a_fetch_of_what_was_damaged(place: Place) -> None:
    content = noise(12 * MB)
    ref, manifest = await place.version(content)
    files = place.files()
    await files.remember(manifest, directory := await files.fetch(ref, manifest))
    digest, size = list(manifest.files[0].sized_chunks())[2]
    data = place.folder / "chunks" / "data.mdb"
    found, raw = data.stat(), data.read_bytes()
    start = sum(manifest.files[0].sizes[:2])
    with data.open("r+b") as file:
        file.seek(raw.index(content[start : start + 1000]) + 500)
        file.write(b"flipped")
    os.utime(data, ns=(found.st_atime_ns, found.st_mtime_ns))
    shutil.rmtree(directory)
    before = moved()
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    assert moved() == before + size, digest
    os.truncate(data, data.stat().st_size // 2)
    shutil.rmtree(directory)
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    assert moved() == before + size + len(content)
    await files.close()


async def test_a_chunk_that_the_store_has_lost_is_taken_from_the_cache(place: Place) -> None:
    content = noise(12 * MB)
    ref, manifest = await place.version(content)
    files = place.files()
    await files.remember(manifest, directory := await files.fetch(ref, manifest))
    shutil.rmtree(directory)
    await alter(place.gateway, "m", manifest.files[0].chunks[1])
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    await files.close()


async def test_what_came_before_a_damaged_chunk_is_not_fetched_twice(place: Place) -> None:
    content = noise(12 * MB)
    ref, manifest = await place.version(content)
    bad, size = list(manifest.files[0].sized_chunks())[-1]
    await alter(place.gateway, "m", bad, noise(size, 5))
    files = place.files()
    with pytest.raises(CorruptChunk, match=bad):
        await files.fetch(ref, manifest)
    before = moved()
    with pytest.raises(CorruptChunk, match=bad):
        await files.fetch(ref, manifest)
    assert moved() == before + size
    await place.store.discard(bad)
    await upload(place.gateway, place.store, parts(content), limit=1 << 30, whole=True)
    assert (await files.fetch(ref, manifest) / "model.onnx").read_bytes() == content
    await files.close()


async def test_versions_that_nobody_holds_make_room_and_held_ones_stay(place: Place) -> None:
    files = place.files(model_files_mb=10)
    made = [await place.version(noise(4 * MB, seed)) for seed in range(4)]
    folders = [place.folder / version_digest(manifest) for _, manifest in made]
    for ref, manifest in made[:2]:
        await files.fetch(ref, manifest)
    files.release(made[0][0])
    files.release(made[1][0])
    os.utime(folders[0])  # used later than the other
    await files.fetch(*made[2])
    assert [folder.exists() for folder in folders] == [True, False, True, False]
    await files.fetch(*made[0])
    await files.fetch(*made[3])
    assert [folder.exists() for folder in folders] == [True, False, True, True], "above the budget, but all held"
    for ref, _ in made:
        files.release(ref)
    await files.sweep()
    assert sum(folder.exists() for folder in folders) == 2
    await files.close()


async def test_what_killed_processes_left_is_deleted(place: Place) -> None:
    files = place.files()
    ref, manifest = await place.version(noise(MB))
    directory = await files.fetch(ref, manifest)
    (directory / f".model.onnx.{2**22 + 1}.ab").write_bytes(b"half")
    (place.folder / ("." + "a" * 64)).mkdir()
    (place.folder / ("." + "a" * 64) / "model.onnx").write_bytes(b"half deleted")
    (place.folder / ("b" * 64)).mkdir()
    (place.folder / ("b" * 64) / f".model.onnx.{2**22 + 1}.ab").write_bytes(b"half")
    await files.sweep()
    assert sorted(path.name for path in place.folder.rglob("*") if path.name != "owner") == sorted(
        {directory.name, "model.onnx", "chunks"}
        | {path.name for path in (place.folder / "chunks").iterdir()} - {"owner"}
    )
    await files.close()


async def test_a_full_disk_gives_up_the_cache_then_versions_and_says_so_when_nothing_is_left(place: Place) -> None:
    with small_disk(place.folder, 40):
        files = place.files(chunk_cache_mb=64)
        made = [await place.version(noise(size * MB, size)) for size in (16, 18, 20)]
        await files.remember(made[0][1], await files.fetch(*made[0]))
        assert files.cache.held(made[0][1].files[0].chunks)
        before = lost("disk")
        await files.fetch(*made[1])
        assert lost("disk") == before + 1
        files.release(made[0][0])
        await files.fetch(*made[2])
        assert not (place.folder / version_digest(made[0][1])).exists()
        with pytest.raises(Unavailable, match="free some disk"):
            await files.fetch(*made[0])
        files.release(made[1][0])
        await files.fetch(*made[0])
        await files.close()


async def test_a_platform_whose_workers_disk_is_small_does_its_jobs(start_broker: StartBroker) -> None:
    async with start_broker(chunk_cache_mb=64, cache_reserve_mb=0) as broker:
        with small_disk(broker.home.cache("worker-1"), 40):
            async with services(broker) as running:
                for size, name in ((20, "large"), (16, "small")):
                    served = await running.push(name, models.padded(size * MB, size))
                    assert (await running.infer(served, np.ones((1, 1), np.float32))).shape == (1, 1)


@pytest.mark.parametrize("megabytes", [8, 0])
async def test_a_worker_keeps_optimised_graphs_unless_it_may_not(start_broker: StartBroker, megabytes: int) -> None:
    async with start_broker(cache_graphs_mb=megabytes) as broker, services(broker) as running:
        served = await running.push("graph", models.add())
        answer = await running.infer(served, np.zeros((1, 4), np.float32))
        assert np.array_equal(answer, np.ones((1, 4), np.float32))
        kept = list((broker.home.cache("worker-1") / "graphs").glob("*.graph"))
        assert len(kept) == (1 if megabytes else 0)


async def registered(running: Services, name: str, content: bytes) -> tuple[ResolvedVersion, ModelFile]:
    served = await running.push(name, content, workers=0)
    return served, served.manifest.files[0]


@asynccontextmanager
async def without_workers(broker: Broker) -> AsyncIterator[Services]:
    async with services(broker, workers=0) as running:
        yield running


async def test_a_version_with_a_damaged_chunk_is_told_tried_again_and_alone(broker: Broker) -> None:
    content = models.padded(12 * MB)
    async with without_workers(broker) as running:
        served, file = await registered(running, "broken", content)
        sound, _ = await registered(running, "sound", models.add())
        bad = file.chunks[1]
        await alter(running.bus, "broken", bad)
        (job,) = await running.gateway.jobs.submit(TENANT, [new_job(served, np.ones((1, 1), np.float32))])
        worker = await running.start_worker("worker-1")
        await wait_until(lambda: bool(worker.holder.failed()), "the failure is known")

        async def told() -> bool:
            return any(
                label == "broken:1" and "corrupt_chunk" in reason and bad in reason
                for beat in await heartbeats(running.gateway)
                for label, reason in beat.failed
            )

        await wait_until(told, "the heartbeat names model and chunk")
        answer = await running.infer(sound, np.zeros((1, 4), np.float32))
        assert np.array_equal(answer, np.ones((1, 4), np.float32))
        assert (await running.gateway.jobs.get(TENANT, job["id"], 0))["state"] == "queued"
        store = ObjectChunkStore(running.bus, running.bus.names.chunk_bucket("broken"))
        await store.discard(bad)
        await upload(running.bus, store, parts(content), limit=1 << 30, whole=True)
        assert (await running.gateway.jobs.get(TENANT, job["id"], 40))["state"] == "succeeded"
        assert not worker.holder.failed()


async def test_a_worker_that_starts_again_needs_neither_store_nor_assembled_files(broker: Broker) -> None:
    content = models.padded(12 * MB)
    async with without_workers(broker) as running:
        served, file = await registered(running, "m", content)
        home: Home = running.home
        async with services(broker, workers=1) as first:
            holder = first.workers[0].holder
            await wait_until(lambda: bool(holder.ready()), "it is loaded")
            await wait_until(lambda: not holder._tasks.named("remember"), "its chunks are kept")
        shutil.rmtree(home.cache("worker-1") / version_digest(served.manifest))
        for digest in file.chunks:
            await alter(running.bus, "m", digest)
        before = moved()
        await running.start_worker("worker-1")
        await wait_until(lambda: bool(running.workers[0].holder.ready()), "it is loaded again")
        assert moved() == before
        await asyncio.wait_for(running.infer(served, np.ones((1, 1), np.float32)), 20)
