"""What takes long in a worker or a model store goes after what does not: runs, loads, inspections, by the kernel's priorities."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import Services
from support.platform.thread_priorities import nice_of_threads

from tether.domain.manifest import Batching, Isolation, Manifest, ModelFile, TensorSpec
from tether.modelstore.inspection.inspector import InspectionLimits, inspect
from tether.process.os_process import NICE
from tether.worker import runtimes
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")

FEW, MANY, ENDLESS = (np.array([trips], np.int64) for trips in (10, 1_000_000, 1 << 50))


async def test_a_long_run_goes_after_others_and_a_short_one_does_not(one: Services) -> None:
    served = await one.push("counting", models.counting())
    await one.infer(served, FEW)
    await wait_until(lambda: NICE not in nice_of_threads(), "the threads of loads have ended", 60)
    long = asyncio.create_task(one.infer(served, ENDLESS))
    await wait_until(lambda: nice_of_threads().count(NICE) == 1, "its thread goes after others")
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    await one.infer(served, FEW)
    await wait_until(lambda: NICE not in nice_of_threads(), "the thread of the long run has done its last")


def counting(folder: Path) -> Manifest:
    """In a process of its own."""
    (folder / "model.onnx").write_bytes(content := models.counting())
    file = ModelFile("model.onnx", len(content), "0" * 64, ("0" * 64,), (len(content),))
    ends = (TensorSpec("n", "INT64", (1,)),), (TensorSpec("y", "FP32", (1,)),)
    return Manifest(
        "m", 1, runtimes.ONNX_PLATFORM, (file,), *ends, Batching(0), 0.0, "test", isolation=Isolation.PROCESS
    )


def test_a_models_process_goes_after_others_from_its_first_long_run_on(tmp_path: Path) -> None:
    runtime = runtimes.load(counting(tmp_path), tmp_path, Options())
    assert isinstance(runtime, ProcessRuntime)
    runtime.run({"n": FEW}, ())
    assert set(nice_of_threads(runtime.pid)) == {0}
    runtime.run({"n": MANY}, ())
    assert set(nice_of_threads(runtime.pid)) == {NICE}
    runtime.close()


async def test_a_long_run_in_a_models_process_goes_after_others_while_it_goes_on(tmp_path: Path) -> None:
    runtime = runtimes.load(counting(tmp_path), tmp_path, Options())
    assert isinstance(runtime, ProcessRuntime)
    running = asyncio.create_task(asyncio.to_thread(runtime.run, {"n": ENDLESS}, ()))
    await wait_until(lambda: set(nice_of_threads(runtime.pid)) == {NICE}, "its process goes after others")
    assert not running.done()
    runtime.close()
    await asyncio.gather(running, return_exceptions=True)


def test_a_model_that_was_moved_to_a_process_for_what_it_did_goes_after_others_from_its_start(tmp_path: Path) -> None:
    runtime = runtimes.load(counting(tmp_path), tmp_path, Options(behind=True))
    assert isinstance(runtime, ProcessRuntime)
    assert set(nice_of_threads(runtime.pid)) == {NICE}
    runtime.close()


async def test_an_inspection_goes_after_others(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(models.looping())
    looking = asyncio.create_task(inspect(tmp_path, "inspect_onnx", InspectionLimits(cpu_s=30, wall_s=60)))

    def behind() -> list[int]:
        return [child.pid for child in psutil.Process().children() if NICE in nice_of_threads(child.pid)]

    await wait_until(lambda: bool(behind()), "its process goes after others", 30)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
