"""Models in processes of their own: what a crash, a hang or a flood of memory costs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.brokers.brokers import wait_until
from support.models import bundles, models

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.domain.tensor import Array
from tether.errors import InferenceFailed, ModelRejected
from tether.frameworks.python_bundle import describe
from tether.process import metrics
from tether.process.os_process import alive
from tether.wire import codec
from tether.worker import runtimes
from tether.worker.runtimes import child_process, process_runtime
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

OPTIONS = Options(run_timeout_s=1.0, memory_mb=4096)


def manifest(platform: str = "python", path: str = "model.py") -> Manifest:
    file = ModelFile(path, 1, "0" * 64, ("0" * 64,), (1,))
    outputs = (TensorSpec("y", "FP32", (-1, 4)),)
    return Manifest("m", 1, platform, (file,), (), outputs, Batching(8), 0.0, "test")


def rows(first: float) -> dict[str, Array]:
    return {"x": np.full((2, 4), first, dtype=np.float32)}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ProcessRuntime]:
    made = runtimes.load(manifest(), bundles.write(tmp_path / "bundle"), OPTIONS)
    assert isinstance(made, ProcessRuntime)
    yield made
    made.close()


def test_a_model_runs_in_its_own_process_and_closing_ends_it(runtime: ProcessRuntime) -> None:
    (found,) = runtime.run(rows(1.0), ())
    np.testing.assert_array_equal(found, np.full((2, 4), 1.5, dtype=np.float32))
    (named,) = runtime.run(rows(2.0), ("y",))
    assert named[0, 0] == 2.5
    pid = runtime.pid
    assert alive(pid)
    runtime.close()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        (-1.0, "SIGABRT"),
        (-2.0, "SIGSEGV"),
        (-3.0, "took longer than 1 s"),
        (-6.0, "status 3"),
    ],
)
def test_what_ends_the_process_costs_that_run_and_no_other(runtime: ProcessRuntime, habit: float, words: str) -> None:
    before = runtime.pid
    with pytest.raises(InferenceFailed, match=words):
        runtime.run(rows(habit), ())
    assert not alive(before)
    (found,) = runtime.run(rows(1.0), ())
    assert found[0, 0] == 1.5
    assert runtime.pid != before


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        (-4.0, "ValueError: no such luck in$"),
        (-7.0, r"PermissionError: \[Errno 13\]"),
        (-8.0, r"shape \[2, 1\], not \[-1, 4\]"),
    ],
)
def test_what_the_model_raises_is_told_and_the_process_lives_on(
    runtime: ProcessRuntime, habit: float, words: str
) -> None:
    before = runtime.pid
    with pytest.raises(InferenceFailed, match=words) as caught:
        runtime.run(rows(habit), ())
    assert "/" not in caught.value.message.replace("and/or", "")
    (found,) = runtime.run(rows(1.0), ())
    assert found[0, 0] == 1.5
    assert runtime.pid == before


def crashes(reason: str) -> float:
    return float(metrics.MODEL_CRASHES.labels("m", reason)._value.get())


def resident_mb(pid: int | str) -> float:
    """Memory that a process has in hand, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.mark.parametrize("habit", [-5.0, -10.0], ids=["at once", "bit by bit"])
def test_a_process_that_runs_out_of_memory_ends_alone_and_is_counted(runtime: ProcessRuntime, habit: float) -> None:
    before, counted = runtime.pid, crashes("memory")
    with pytest.raises(InferenceFailed, match=r"ran out of memory and was ended: its limit is 4096 MiB; MemoryError"):
        runtime.run(rows(habit), ())
    assert not alive(before)
    assert crashes("memory") == counted + 1
    (found,) = runtime.run(rows(1.0), ())
    assert found[0, 0] == 1.5
    assert runtime.pid != before


def test_an_answer_that_fits_and_whose_message_does_not_is_want_of_memory(tmp_path: Path) -> None:
    made = runtimes.load(manifest(), bundles.write(tmp_path / "bundle"), Options(memory_mb=2048))
    counted = crashes("memory")
    try:
        with pytest.raises(InferenceFailed, match="ran out of memory"):
            made.run({"x": np.array([[-11, 32 << 20, 0, 0]], np.float32)}, ())
        assert crashes("memory") == counted + 1
        assert made.run(rows(1.0), ())[0][0, 0] == 1.5
    finally:
        made.close()


def test_messages_that_are_too_large_are_refused_and_end_no_process(
    runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = runtime.pid
    monkeypatch.setattr(process_runtime, "LARGEST_FRAME", 1000)
    with pytest.raises(InferenceFailed, match=r"the inputs of one run have \d+ bytes; the limit is 1000"):
        runtime.run({"x": np.zeros((100, 4), np.float32)}, ())
    (found,) = runtime.run(rows(1.0), ())
    assert found[0, 0] == 1.5
    assert runtime.pid == pid
    monkeypatch.setattr(child_process, "LARGEST_FRAME", 1000)
    assert child_process._packed((True, ["x" * 900]), OPTIONS)[0] is True
    good, content = child_process._packed((True, ["x" * 1000]), OPTIONS)
    assert (good, codec.unpack(content)) == (
        False,
        (False, "the outputs of one run have 1006 bytes; the limit is 1000"),
    )


def test_an_onnx_model_that_runs_out_of_memory_costs_its_process_only(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(models.expanding())
    made = msgspec.structs.replace(manifest("onnxruntime_onnx", "model.onnx"), isolation="process")
    own = runtimes.load(made, tmp_path, Options(memory_mb=4096))
    try:
        with pytest.raises(InferenceFailed, match="ran out of memory"):
            own.run({"x": np.array([1 << 38], np.int64)}, ())
        assert own.run({"x": np.array([3], np.int64)}, ())[0].shape == (3,)
    finally:
        own.close()


def test_want_of_memory_is_told_from_other_ends(runtime: ProcessRuntime) -> None:
    counted = crashes("memory")
    os.kill(runtime.pid, signal.SIGKILL)
    with pytest.raises(InferenceFailed, match=r"SIGKILL\)$"):
        runtime.run(rows(1.0), ())
    assert crashes("memory") == counted


def test_the_kernel_ends_a_models_process_before_the_worker(runtime: ProcessRuntime) -> None:
    assert Path(f"/proc/{runtime.pid}/oom_score_adj").read_text().strip() == "1000"
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000


def test_a_model_that_needs_more_than_it_may_have_is_not_loaded(tmp_path: Path) -> None:
    folder = bundles.write(tmp_path / "large", code="import numpy as np\nheld = np.ones(1 << 30)")
    with pytest.raises(ModelRejected, match=r"ran out of memory .* its limit is 4096 MiB; MemoryError"):
        runtimes.load(manifest(), folder, OPTIONS)


def test_runs_that_fail_in_a_row_wait_longer_each_time(tmp_path: Path) -> None:
    made = runtimes.load(manifest(), bundles.write(tmp_path / "bundle"), OPTIONS)
    assert isinstance(made, ProcessRuntime)
    pauses = [0.0]
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(InferenceFailed, match="ran out of memory"):
            made.run(rows(-5.0), ())
        assert time.monotonic() - began >= pauses[-1]
        pauses.append(made.pause_s)
    assert pauses == sorted(set(pauses))
    made.run(rows(1.0), ())
    made.close()


def test_unloading_gives_the_memory_back(tmp_path: Path) -> None:
    own = resident_mb("self")
    code = bundles.CODE.replace("self.bias =", "self.held = np.ones(50 << 20); self.bias =")
    made = runtimes.load(manifest(), bundles.write(tmp_path / "large", code=code), OPTIONS)
    assert isinstance(made, ProcessRuntime)
    made.run(rows(1.0), ())
    pid = made.pid
    assert resident_mb(pid) > 400
    assert resident_mb("self") < own + 100
    made.close()
    assert not alive(pid)


def test_unloading_gives_the_memory_back_in_the_workers_own_process_too(tmp_path: Path) -> None:
    folder = models.split(tmp_path / "split", width=6000)  # 144 MB
    own = resident_mb("self")
    made = runtimes.load(manifest("onnxruntime_onnx", "model.onnx"), folder, Options())
    made.run({"x": np.ones((1, 6000), np.float32)}, ())
    assert resident_mb("self") > own + 100
    made.close()
    assert resident_mb("self") < own + 50


def test_what_cannot_be_loaded_is_refused_with_its_reason(tmp_path: Path) -> None:
    for number, (code, words) in enumerate(
        [
            ("class Model:\n    def __init__(self): raise RuntimeError('not today')", "not today"),
            ("class Other: pass", "no class 'Model'"),
            ("class Model: pass", "no predict"),
            ("import os; os._exit(4)", "status 4"),
            ("import absent_library", "absent_library"),
        ]
    ):
        folder = bundles.write(tmp_path / str(number), code=code)
        with pytest.raises(ModelRejected, match=words):
            runtimes.load(manifest(), folder, OPTIONS)
    with pytest.raises(ModelRejected, match="this worker has no runtime"):
        runtimes.load(manifest("caffe"), tmp_path, OPTIONS)


def test_a_description_that_is_not_right_is_refused(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"className": "os.system"},
        {"inputs": [{"name": "x", "datatype": "FP99", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]},
        {"outputs": []},
        {"maxBatchSize": -1},
        {"unknown": 1},
    ]
    for number, change in enumerate(bad):
        with pytest.raises(ModelRejected):
            describe(bundles.write(tmp_path / str(number), **change))
    assert describe(bundles.write(tmp_path / "good")).max_batch_size == 8


async def test_a_killed_process_is_started_again(runtime: ProcessRuntime) -> None:
    pid = runtime.pid
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not alive(pid), "the process is gone")
    with pytest.raises(InferenceFailed, match="SIGKILL"):
        runtime.run(rows(1.0), ())
    assert runtime.run(rows(1.0), ())[0][0, 0] == 1.5
