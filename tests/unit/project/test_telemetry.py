"""No library that Tether imports writes an identifier of the machine or sends its use to its maker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tether.sandbox import plan

ROOT = Path(__file__).parents[3]
LOADERS = {
    "worker": "from tether.worker.runtimes import onnx; onnx.onnxruntime.InferenceSession({model!r})",
    "model store": "from pathlib import Path; from tether.modelstore.inspection.file_formats import onnx as inspect_onnx; inspect_onnx._load(Path({model!r}))",
}


@pytest.mark.parametrize("service", LOADERS)
def test_a_service_that_loads_an_onnx_model_writes_nothing_into_the_home_folder(service: str, tmp_path: Path) -> None:
    program = LOADERS[service].format(model=str(ROOT / "examples" / "digits" / "digits.onnx"))
    # nothing of this process's own: ONNX Runtime sends nothing where CI says that it is one
    environ = {"HOME": str(tmp_path), "PATH": os.defpath, "PYTHONPATH": os.pathsep.join(plan.import_paths())}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True, capture_output=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []


def test_a_model_in_a_process_of_its_own_inherits_it() -> None:
    assert plan.environment()["ORT_DISABLE_TELEMETRY"] == "1"
