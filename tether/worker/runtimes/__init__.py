"""One file per framework, and the one place that knows which file serves which platform."""

from __future__ import annotations

from pathlib import Path

from tether.errors import ModelRejected
from tether.model import Manifest
from tether.ports import Runtime

ONNX_PLATFORM = "onnxruntime_onnx"


def load(manifest: Manifest, directory: Path, *, threads: int) -> Runtime:
    """Load a version's files into memory. Blocks: call it in a thread.

    Raises:
        ModelRejected: no runtime serves the manifest's platform, or the framework refuses the file.
    """
    if manifest.platform == ONNX_PLATFORM:
        from tether.worker.runtimes.onnx import OnnxRuntime  # noqa: PLC0415 - a heavy library, loaded when it is needed

        return OnnxRuntime(manifest, directory, threads=threads)
    raise ModelRejected(f"no runtime of this worker serves the platform '{manifest.platform}'")
