"""Versions that are loaded by their first job, unloaded for others or for idleness, and what that gives back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles, models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.domain.manifest import ModelRef
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import Loading
from tether.process import metrics
from tether.worker.models.instances import InstanceSet
from tether.worker.models.loader import Loader
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.version_manager import HostedVersion

ONE = np.ones((1, 1), np.float32)
MB = 1 << 20


def held(running: Services, name: str) -> HostedVersion:
    return running.workers[0].holder._held[ModelRef(name, 1)]


def in_memory(running: Services) -> set[str]:
    return {ref.model for ref in running.workers[0].holder.in_memory()}


def anonymous(process: psutil.Process) -> int:
    """Bytes of memory without pages of files: those of the cache of chunks are the kernel's to keep or to drop."""
    found = process.memory_info()
    return int(found.rss - found.shared)


def from_broker() -> float:
    return float(metrics.CHUNKS_BYTES.labels("broker")._value.get())


def flagged(folder: Path, flag: Path) -> Path:
    """A bundle that cannot be loaded while there is a file ``flag``."""
    guard = f"        assert not os.path.exists({str(flag)!r}), 'not now'\n"
    return bundles.write(folder, code=bundles.CODE.replace("        self.bias", f"{guard}        self.bias", 1))


async def test_a_lazy_version_has_its_files_and_is_loaded_once_by_the_first_jobs_who_all_wait_for_it(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = 0
    load = Loader.load

    async def counted(self: Loader) -> InstanceSet:
        nonlocal loads
        loads += 1
        return await load(self)

    monkeypatch.setattr(Loader, "load", counted)
    await one.decide("bump", loading=Loading.LAZY)
    served = await one.push("bump", models.add())
    assert (in_memory(one), loads) == (set(), 0)
    before = from_broker()
    shown = await one.gateway.jobs.submit(TENANT, [new_job(served, row(number)) for number in range(20)])
    answers = await asyncio.gather(*[one.infer(served, row(number)) for number in range(20)])
    assert [answer[0, 0] for answer in answers] == [number + 1 for number in range(20)]
    ended = await one.gateway.jobs.get_many(TENANT, [job["id"] for job in shown], 40)
    assert {(job["state"], job["attempts"]) for job in ended} == {("succeeded", 1)}
    assert (in_memory(one), loads, from_broker()) == ({"bump"}, 1, before)


async def test_what_is_idle_is_unloaded_unless_it_is_pinned_and_its_next_job_loads_it(one: Services) -> None:
    await one.decide("idle", idle_unload_s=0.1)
    await one.decide("pinned", idle_unload_s=0.1, pinned=True, loading=Loading.LAZY)
    pinned = await one.push("pinned", models.add(2.0))
    idle = await one.push("idle", models.add(1.0))
    await wait_until(lambda: in_memory(one) == {"pinned"}, "the idle one is gone")
    assert {ref.model for ref in one.workers[0].holder.ready()} == {"idle", "pinned"}
    for _ in range(3):
        assert (await one.infer(idle, row(1)))[0, 0] == 2
        await wait_until(lambda: in_memory(one) == {"pinned"}, "it is gone again")
    assert (await one.infer(pinned, row(1)))[0, 0] == 3
    await one.decide("idle", pinned=True)
    assert (await one.infer(idle, row(1)))[0, 0] == 2
    await one.decide("idle", loading=Loading.LAZY, idle_unload_s=0.1)
    await wait_until(lambda: in_memory(one) == {"pinned"}, "it may go")
    await one.decide("idle")
    await wait_until(lambda: in_memory(one) == {"idle", "pinned"}, "what is not lazy any more is loaded")


async def test_three_models_share_the_memory_of_two(broker: Broker) -> None:
    async with services(broker, workers=0) as running:
        await running.start_worker("worker-1", worker_memory_mb=2)
        served: dict[str, ResolvedVersion] = {}
        for seed, name in enumerate("abc"):
            await running.decide(name, loading=Loading.LAZY)
            served[name] = await running.push(name, models.square(480, seed))
        for name, expected in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            await running.infer(served[name], ONE)
            assert in_memory(running) == set(expected)
        assert running.workers[0].holder.memory.taken(ModelRef("a", 1)) == 0
        calls = [running.infer(served["abc"[number % 3]], ONE * number) for number in range(60)]
        found = await asyncio.gather(*calls)
        scale = [found[number][0, 0] for number in (3, 4, 5)]
        for number, answer in enumerate(found):
            np.testing.assert_allclose(answer[0, 0] * (3 + number % 3), scale[number % 3] * number, rtol=1e-3)


async def test_a_load_waits_until_what_is_in_use_is_idle(broker: Broker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    wait = f"        while x.min() >= 5 and not os.path.exists({str(gate)!r}):\n            time.sleep(0.01)\n"
    code = bundles.CODE.replace("        first =", f"{wait}        first =", 1)
    folder = bundles.write(tmp_path / "busy", code=code)
    (folder / "data" / "weights.bin").write_bytes(os.urandom(700_000))
    async with services(broker, workers=0) as running:
        await running.start_worker("worker-1", worker_memory_mb=1)
        for name in ("busy", "other"):
            await running.decide(name, loading=Loading.LAZY)
        busy = await running.push_bundle("busy", folder)
        other = await running.push("other", models.square(450))
        memory = running.workers[0].holder.memory
        first = asyncio.create_task(running.infer(busy, row(5)))
        await wait_until(lambda: in_memory(running) == {"busy"}, "it is loaded and in use")
        second = asyncio.create_task(running.infer(other, ONE))
        await wait_until(lambda: bool(memory._waiting), "the other one waits for room")
        assert not first.done()
        gate.touch()
        assert (await first)[0, 0] == 5.5
        await second
        await wait_until(lambda: in_memory(running) == {"other"}, "it has the room")


async def test_a_version_that_cannot_be_loaded_when_its_job_comes_is_not_ready_and_the_job_waits(
    one: Services, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    await one.decide("moody", loading=Loading.LAZY)
    served = await one.push_bundle("moody", flagged(tmp_path / "moody", flag))
    holder = one.workers[0].holder
    flag.touch()
    shown = await one.gateway.jobs.submit(TENANT, [new_job(served, row(1)) for _ in range(3)])
    await wait_until(lambda: bool(holder.failed()) and not holder.ready(), "it says why", 60)
    assert "AssertionError: not now" in dict(holder.failed())["moody:1"]
    flag.unlink()
    ended = await one.gateway.jobs.get_many(TENANT, [job["id"] for job in shown], 60)
    assert {job["state"] for job in ended} == {"succeeded"}
    await wait_until(lambda: holder.ready() == (ModelRef("moody", 1),) and not holder.failed(), "it is ready")


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_unloading_gives_the_memory_back(one: Services, isolation: str) -> None:
    size = 4 * 4000 * 4000
    await one.decide("large", isolation=isolation, loading=Loading.LAZY)
    served = await one.push("large", models.square(4000))
    own = psutil.Process()
    await one.infer(served, ONE)  # the first load of all leaves what ONNX Runtime needs for itself
    await one.decide("large", isolation=isolation, idle_unload_s=0.1, loading=Loading.LAZY)
    await wait_until(lambda: not in_memory(one), "it is unloaded for the first time")
    await one.decide("large", isolation=isolation, loading=Loading.LAZY)
    before = anonymous(own)
    await one.infer(served, ONE)
    (runtime,) = held(one, "large").instance.instances.runtimes
    process = psutil.Process(runtime.pid) if isinstance(runtime, ProcessRuntime) else own
    del runtime
    loaded = anonymous(process)
    assert loaded > (size if isolation == "process" else before + 0.8 * size)
    await one.decide("large", isolation=isolation, idle_unload_s=0.1, loading=Loading.LAZY)
    await wait_until(lambda: not in_memory(one), "it is unloaded")
    if isolation == "process":
        await wait_until(lambda: not process.is_running(), "its process has ended")
    await wait_until(lambda: anonymous(own) < before + 0.2 * size, "the memory is back", 30)
