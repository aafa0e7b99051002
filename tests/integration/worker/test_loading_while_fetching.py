"""A version's process starts while its files are fetched: it sees none that is not verified, and ends when they do not come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles, models
from support.platform.services import Services, row, services

from tether.domain.manifest import Batching, Manifest, ModelFile, ModelRef, SealedDigests, TensorSpec
from tether.errors import ModelRejected
from tether.frameworks import plugins
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import ModelConfig
from tether.process import metrics
from tether.process.os_process import alive
from tether.storage.chunk_store import ObjectChunkStore
from tether.worker import runtimes, version_manager
from tether.worker.files import version_files
from tether.worker.models.loader import Loader
from tether.worker.models.memory_budget import Memory
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime
from tether.worker.service import WorkerService

LIMIT = Options(load_timeout_s=20.0)


class Gate:
    """Keeps every chunk of a model back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = opened = asyncio.Event()
        self.asked = asked = asyncio.Event()

        class Gated(ObjectChunkStore):
            async def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]:
                asked.set()
                await opened.wait()
                async with aclosing(super().get(digests)) as chunks:
                    async for chunk in chunks:
                        yield chunk

        monkeypatch.setattr(version_files, "ObjectChunkStore", Gated)


_OTHERS: set[int] = set()
"""Processes of models of other tests' platforms, which may live on beside this one."""


@pytest.fixture(autouse=True)
def others() -> Iterator[None]:
    _OTHERS.update(process.pid for process in processes())
    yield
    _OTHERS.clear()


def waiting() -> list[psutil.Process]:
    """Processes of models that wait for their files: they are nowhere near them."""
    return [process for process in processes() if process.cwd() == "/"]


def processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            known = child.pid in _OTHERS
            if not known and "tether.worker.runtimes.child_process" in child.cmdline() and alive(child.pid):
                found.append(child)
    return found


async def start(running: Services) -> WorkerService:
    """A worker whose only version has a process that waits for its files."""
    worker = await running.start_worker("worker-1")
    await wait_until(lambda: len(waiting()) == 1, "the process is there")
    return worker


def reasons(worker: WorkerService) -> str:
    return " ".join(reason for _, reason in worker.holder.failed())


async def ready(running: Services, served: ResolvedVersion) -> None:
    await wait_until(lambda: bool(running.workers[0].holder.in_memory()), "it is loaded", 30)
    await wait_until(lambda: bool(running.gateway.catalog.workers(served)), "the gateway knows")


async def test_the_process_is_there_before_the_files_are(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with services(broker, workers=0) as running:
        served = await running.push_bundle("m", bundles.write(tmp_path / "m"), workers=0)
        gate = Gate(monkeypatch)
        worker = await start(running)
        (process,) = waiting()
        await asyncio.wait_for(gate.asked.wait(), 15)
        folder = worker.holder.files._held[ModelRef("m", 1)].directory
        assert not [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        assert not worker.holder.in_memory()
        gate.opened.set()
        await ready(running, served)
        assert process.cwd() == str(folder)
        assert [one.pid for one in processes() if one.cwd() == str(folder)] == [process.pid]
        assert (await running.infer(served, row(1.0)))[0, 0] == 1.5


async def test_a_fetch_that_fails_leaves_no_process_and_the_next_try_starts_none(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with services(broker, workers=0) as running:
        served = await running.push_bundle("m", bundles.write(tmp_path / "m"), workers=0)
        for file in served.manifest.files:
            bucket = running.bus.names.chunk_bucket("m")
            await running.bus.publish_acked(running.bus.names.object_chunk(bucket, file.chunks[0]), b"evil")
        gate = Gate(monkeypatch)
        worker = await start(running)
        (process,) = waiting()
        gate.opened.set()
        await wait_until(lambda: "corrupt_chunk" in reasons(worker), "the load has failed")
        assert not alive(process.pid)
        gate.asked.clear()
        await asyncio.wait_for(gate.asked.wait(), 15)
        assert not processes()
        assert not worker.holder.memory.taken(ModelRef("m", 1))


async def test_a_worker_that_stops_while_it_fetches_leaves_no_process(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with services(broker, workers=0) as running:
        await running.push_bundle("m", bundles.write(tmp_path / "m"), workers=0)
        Gate(monkeypatch)
        crashes = metrics.MODEL_CRASHES.labels("m", "signal")._value.get()
        worker = await start(running)
        (process,) = waiting()
        await worker.holder.stop(0)
        assert not alive(process.pid)
        assert metrics.MODEL_CRASHES.labels("m", "signal")._value.get() == crashes  # what is wanted is no crash


async def test_a_process_that_is_killed_while_it_waits_is_told_and_the_next_try_loads(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    tell = version_manager.VersionManager._report_failure

    def heard(self: version_manager.VersionManager, ref: ModelRef, error: Exception) -> None:
        tell(self, ref, error)
        seen.extend(reason for _, reason in self.failed())

    monkeypatch.setattr(version_manager.VersionManager, "_report_failure", heard)
    async with services(broker, workers=0) as running:
        served = await running.push_bundle("m", bundles.write(tmp_path / "m"), workers=0)
        gate = Gate(monkeypatch)
        await start(running)
        (process,) = waiting()
        process.kill()
        await wait_until(lambda: not alive(process.pid), "it is dead")
        gate.opened.set()
        await ready(running, served)
        assert seen == ["model_rejected: cannot load the model: the model's process was ended by signal 9 (SIGKILL)"]
        assert (await running.infer(served, row(1.0)))[0, 0] == 1.5


async def test_only_so_many_processes_wait_at_a_time_and_all_versions_load(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_manager, "_AHEAD", 1)
    async with services(broker, workers=0) as running:
        served = [
            await running.push_bundle(name, bundles.write(tmp_path / name, bias=bias), workers=0)
            for name, bias in (("a", 1.0), ("b", 2.0))
        ]
        gate = Gate(monkeypatch)
        worker = await start(running)
        await wait_until(lambda: len(worker.holder.files._held) == 2, "both are fetched")
        assert len(processes()) == 1
        gate.opened.set()
        await wait_until(lambda: len(worker.holder.in_memory()) == 2, "both are loaded", 30)
        await wait_until(lambda: all(map(running.gateway.catalog.workers, served)), "the gateway knows")
        assert [(await running.infer(one, row(1.0)))[0, 0] for one in served] == [2.0, 3.0]


async def test_no_process_waits_where_others_would_be_unloaded_for_it(one: Services, tmp_path: Path) -> None:
    version, other = manifest(), ModelRef("other", 1)
    memory = Memory(version.size, list)
    loader = Loader(one.bus, version, bundles.write(tmp_path / "m"), ModelConfig("m"), memory)
    memory.change(other, version.size)
    loader.prepare()
    assert not processes()
    memory.change(other, 0)
    loader.prepare()
    assert memory.taken(ModelRef("m", 1)) == version.size
    await wait_until(lambda: bool(processes()), "the process is there")
    await loader.abort()
    assert not processes()
    assert not memory.taken(ModelRef("m", 1))


def manifest(platform: str = "python", **changes: Any) -> Manifest:
    file = ModelFile("model.py", 1, "0" * 64, ("0" * 64,), (1,))
    made = Manifest("m", 1, platform, (file,), (), (TensorSpec("y", "FP32", (-1, 4)),), Batching(8), 0.0, "test")
    return msgspec.structs.replace(made, **changes)


def began(folder: Path, options: Options = LIMIT, **changes: Any) -> ProcessRuntime:
    found = runtimes.begin(manifest(**changes), folder, options)
    assert isinstance(found, ProcessRuntime)
    return found


async def loads(make: Callable[[], object], begun: ProcessRuntime) -> None:
    """It waits, the files are made, and it runs in the same process."""
    pid = begun.pid
    try:
        make()
        begun.load()
        assert begun.run({"x": np.ones((1, 4), np.float32)}, ())[0][0, 0] == 1.5
        assert begun.pid == pid
    finally:
        begun.close()
    assert not alive(pid)


async def test_waiting_for_files_takes_nothing_of_the_time_to_load(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    begun = began(tmp_path / "m", Options(load_timeout_s=3.0))
    until = time.monotonic() + 3.5
    await wait_until(lambda: time.monotonic() > until, "longer than a load may take")
    await loads(lambda: bundles.write(tmp_path / "m"), begun)


async def test_a_restart_needs_no_second_word_about_the_files(tmp_path: Path) -> None:
    begun = began(bundles.write(tmp_path / "m"))
    begun.load()
    pid = begun.pid
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not alive(pid), "the process is gone")
    try:
        with pytest.raises(Exception, match="SIGKILL"):
            begun.run({"x": np.ones((1, 4), np.float32)}, ())
        assert begun.run({"x": np.ones((1, 4), np.float32)}, ())[0][0, 0] == 1.5
    finally:
        begun.close()


def test_a_framework_that_cannot_be_imported_is_told_when_the_files_are_there(tmp_path: Path) -> None:
    metadata = tmp_path / "absent-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: absent\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[tether.runtimes]\nabsent = tether_absent_module\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        plugins.installed.cache_clear()
        begun = began(tmp_path, platform="absent")
        with pytest.raises(ModelRejected, match=r"'absent' cannot be imported from 'tether_absent_module'"):
            begun.load()
        assert not begun.pid
    plugins.installed.cache_clear()


def test_what_an_encrypted_models_framework_writes_while_it_waits_stays_in_memory(tmp_path: Path) -> None:
    begun = began(tmp_path, sealed=SealedDigests(b"k" * 16, b"box"))
    try:
        environment = psutil.Process(begun.pid).environ()
        assert environment["TMPDIR"] == str(tmp_path)
    finally:
        begun.close()


def test_a_model_for_the_workers_own_process_reads_nothing_before_its_files_are_there(tmp_path: Path) -> None:
    made = manifest("onnxruntime_onnx", outputs=(TensorSpec("y", "FP32", (-1, 4)),))
    begun = runtimes.begin(made, tmp_path / "m", Options())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.py").write_bytes(models.add())
    runtime = begun.load()
    assert runtime.run({"x": np.ones((1, 4), np.float32)}, ())[0].shape == (1, 4)
    runtime.close()
