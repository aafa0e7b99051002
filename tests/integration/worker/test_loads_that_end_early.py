"""A worker that stops while it loads a model leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.brokers.brokers import wait_until
from support.models import bundles, models
from support.platform.services import Services

from tether.domain.manifest import Batching, Manifest, ModelFile
from tether.errors import InferenceFailed, ModelRejected
from tether.model.config import ModelConfig
from tether.process import metrics
from tether.worker import runtimes
from tether.worker.models.loader import Loader
from tether.worker.models.memory_budget import Memory
from tether.worker.runtimes.process_runtime import Options

SLOW = "import time\ntime.sleep(600)\nclass Model: pass"


def children(folder: Path) -> list[psutil.Process]:
    """Processes of the model that lies in ``folder``."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cwd() == str(folder):
                found.append(child)
    return found


async def test_a_load_that_nobody_wants_ends_its_process(one: Services, tmp_path: Path) -> None:
    file = ModelFile("model.py", 1, "0" * 64, ("0" * 64,), (1,))
    manifest = Manifest("m", 1, "python", (file,), (), (), Batching(8), 0.0, "test")
    loader = Loader(
        one.bus, manifest, bundles.write(tmp_path / "slow", code=SLOW), ModelConfig("m", instances=2), Memory(0, list)
    )
    loading = asyncio.create_task(loader.load())
    await wait_until(lambda: bool(children(tmp_path / "slow")), "the process is there")
    counted = metrics.MODEL_CRASHES.labels("m", "protocol")._value.get()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not children(tmp_path / "slow")
    assert metrics.MODEL_CRASHES.labels("m", "protocol")._value.get() == counted  # what is wanted is no crash


def test_a_model_that_takes_too_long_to_load_is_refused(tmp_path: Path) -> None:
    file = ModelFile("model.py", 1, "0" * 64, ("0" * 64,), (1,))
    manifest = Manifest("m", 1, "python", (file,), (), (), Batching(8), 0.0, "test")
    with pytest.raises(ModelRejected, match=r"took longer than 0\.5 s"):
        runtimes.load(manifest, bundles.write(tmp_path / "slow", code=SLOW), Options(load_timeout_s=0.5))
    assert not children(tmp_path / "slow")


def test_a_load_that_was_ended_while_its_session_was_made_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content := models.slow_when_long())
    file = ModelFile("model.onnx", len(content), "0" * 64, ("0" * 64,), (len(content),))
    manifest = Manifest("m", 1, runtimes.ONNX_PLATFORM, (file,), (), (), Batching(0), 0.0, "test")
    begun = runtimes.begin(manifest, tmp_path, Options())
    begun.end()
    loaded = begun.load()
    with pytest.raises(InferenceFailed, match="the run was ended"):
        loaded.run({"x": np.zeros(200, np.float32)}, ["y"])
    begun.close()
