"""What the loads of one tenant's models leave to those of others in a worker."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import Services
from support.platform.thread_priorities import nice_of_threads

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.model.config import ModelConfig, Warmup
from tether.process.os_process import NICE
from tether.worker.models.loader import EACH, Loader, Loads
from tether.worker.models.memory_budget import Memory
from tether.worker.runtimes import ONNX_PLATFORM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")


def loader(one: Services, folder: Path, tenant: str, content: bytes, loads: Loads, *warmup: Warmup) -> Loader:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    file = ModelFile("model.onnx", len(content), "0" * 64, ("0" * 64,), (len(content),))
    made = Manifest("m", 1, ONNX_PLATFORM, (file,), (TensorSpec("x", "FP32", (-1,)),), (), Batching(0), 0.0, "test")
    manifest = msgspec.structs.replace(made, tenant=tenant)
    return Loader(one.bus, manifest, folder, ModelConfig("m", warmup=warmup), Memory(0, list), loads=loads)


async def test_a_tenants_loads_that_do_not_end_keep_no_other_tenants_waiting(one: Services, tmp_path: Path) -> None:
    loads, endless = Loads(one.bus.clock.monotonic), Warmup(shapes={"x": (200,)})
    hostile = [
        asyncio.create_task(
            loader(one, tmp_path / f"h{number}", "hostile", models.slow_when_long(), loads, endless).load()
        )
        for number in range(EACH + 2)
    ]
    await wait_until(lambda: nice_of_threads().count(NICE) == EACH, "all of its seats are taken, behind others", 60)
    async with asyncio.timeout(30):
        generation = await loader(one, tmp_path / "modest", "modest", models.slow_when_long(), loads).load()
    assert not any(task.done() for task in hostile)
    generation.close()
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    await wait_until(lambda: nice_of_threads().count(NICE) == 0, "its threads have ended", 60)
