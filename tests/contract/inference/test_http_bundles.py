"""Models that are programs, over HTTP: pushed by who may, run in a process of their own, and what their crashes cost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.http.served import Served, until
from support.models import bundles, models

from tether import Client
from tether.domain.tensor import Array
from tether.errors import FormatNotAllowed, InferenceFailed, InvalidRequest, ModelRejected
from tether.sandbox import plan
from tether.sandbox.trial import tried
from tether.worker.runtimes.process_runtime import ProcessRuntime


def ready(served: Served, name: str) -> None:
    with httpx.Client(base_url=served.url, headers=served.headers, timeout=10, trust_env=False) as http:
        until(lambda: http.get(f"/v2/models/{name}/ready").status_code == 200, f"{name} is ready")


def x(first: float) -> dict[str, Array]:
    return {"x": np.full((1, 4), first, dtype=np.float32)}


@pytest.fixture(scope="module")
def bundle(served: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    with Client(served.url, served.key) as client:
        told = client.push("bundle", bundles.write(tmp_path_factory.mktemp("b") / "bundle"), run_timeout_s=1.0)
    assert (told["platform"], told["inputs"]) == ("python", [bundles.FP32])
    ready(served, "bundle")
    return "bundle"


def test_a_bundle_is_served(served: Served, sdk: Client, bundle: str) -> None:
    np.testing.assert_array_equal(sdk.infer(bundle, x(1.0))["y"], np.full((1, 4), 1.5, dtype=np.float32))
    (version,) = sdk.model(bundle)["versions"]
    assert [file["path"] for file in version["files"]] == ["data/bias.txt", "model.json", "model.py"]
    own = sdk.infer(bundle, x(-9.0))["y"][0, 0]
    held = [
        runtime
        for one in served.services.workers[0].holder._held.values()
        for runtime in one.instance.instances.runtimes
    ]
    assert own in [runtime.pid % 65536 for runtime in held if isinstance(runtime, ProcessRuntime)]


WRITES = """
import tempfile
from pathlib import Path

class Model:
    def load(self, directory):
        self.folder = tempfile.TemporaryDirectory()
        Path(self.folder.name, "bias").write_bytes((directory / "data" / "bias.txt").read_bytes())

    def predict(self, inputs):
        return {"y": inputs["x"] + float(Path(self.folder.name, "bias").read_text())}
"""


@pytest.mark.skipif(not tried(plan.REQUIRED, 1).scratch, reason="the kernel gives no folder in memory here")
def test_a_bundle_that_writes_temporary_files_when_it_is_loaded_is_pushed_and_served(
    served: Served, sdk: Client, tmp_path: Path
) -> None:
    told = sdk.push("writing", bundles.write(tmp_path / "writing", code=WRITES))
    assert not told["untried"]
    sdk.wait_ready("writing", told["version"])
    np.testing.assert_array_equal(sdk.infer("writing", x(1.0))["y"], np.full((1, 4), 1.5, dtype=np.float32))


@pytest.mark.parametrize(("habit", "words"), [(-2.0, "SIGSEGV"), (-3.0, "took longer than 1 s")])
def test_a_crash_or_a_hang_costs_only_its_own_job(sdk: Client, bundle: str, habit: float, words: str) -> None:
    """Jobs that were joined with it in one run end well."""
    start = threading.Barrier(13)

    def ask(first: float) -> Array:
        start.wait()
        return sdk.infer(bundle, x(first))["y"]

    with ThreadPoolExecutor(12) as pool:
        good = [pool.submit(ask, float(n)) for n in range(11)]
        bad = pool.submit(ask, habit)
        start.wait()
        for number, answer in enumerate(good):
            assert answer.result()[0, 0] == number + 0.5
        with pytest.raises(InferenceFailed, match=words):
            bad.result()


def test_durable_jobs_end_too(sdk: Client, bundle: str) -> None:
    handles = sdk.submit_many(bundle, [x(1.0), x(-2.0), x(2.0)])
    assert handles[0].result(timeout=30)["y"][0, 0] == 1.5
    with pytest.raises(InferenceFailed, match="SIGSEGV"):
        handles[1].result(timeout=30)
    assert handles[2].result(timeout=30)["y"][0, 0] == 2.5


def test_programs_are_pushed_only_by_who_may(served: Served, tmp_path: Path) -> None:
    folder = bundles.write(tmp_path / "bundle", code="import pathlib; pathlib.Path('sentinel').write_text('ran')")
    with (
        Client(served.url, served.new_key("models:write", "models:read")) as writer,
        pytest.raises(FormatNotAllowed, match="models:code"),
    ):
        writer.push("untrusted", folder)
    with Client(served.url, served.new_key("models:write", "models:code")) as trusted, pytest.raises(ModelRejected):
        trusted.push("untrusted", folder)
    assert not list(tmp_path.rglob("sentinel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"className": "Absent"}, "no class"),
        ({"code": "class Model:\n    def predict(self, inputs): return {}"}, "returned no output 'y'"),
        ({"code": "x = bytearray(1 << 42)"}, "memory"),
        ({"code": "import os; os.kill(os.getpid(), 11)"}, "signal 11"),
        ({"code": "import pathlib; pathlib.Path('written').write_text('x' * 9)"}, "(OS|Permission)Error"),
    ],
)
def test_a_bundle_that_cannot_run_is_refused(sdk: Client, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRejected, match=words):
        sdk.push("refused", bundles.write(tmp_path / "bundle", **change))


def test_where_a_model_runs_is_a_choice_for_onnx_alone(served: Served, sdk: Client, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.add(2.0))
    sdk.push("apart", path, isolation="process")
    ready(served, "apart")
    assert sdk.infer("apart", x(1.0))["y"][0, 0] == 3.0
    with pytest.raises(InvalidRequest, match="thread of the worker"):
        sdk.push("inside", bundles.write(tmp_path / "bundle"), isolation="thread")
    with pytest.raises(InvalidRequest, match="isolation"):
        sdk.push("inside", path, isolation="elsewhere")
    with pytest.raises(InvalidRequest, match="no such file or folder"):
        sdk.push("inside", tmp_path / "model.pkl")
