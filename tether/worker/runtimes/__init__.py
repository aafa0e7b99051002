"""One file per framework, and the one place that knows which file serves which platform, and in whose process."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

from tether import plugins
from tether.errors import ModelRejected
from tether.model import Isolation, Manifest, isolation_of
from tether.ports import Runtime
from tether.worker.runtimes.process import Options, ProcessRuntime

ONNX_PLATFORM = "onnxruntime_onnx"

FILES = {
    ONNX_PLATFORM: "onnx",
    "python": "custom",
    "pytorch_export": "torch",
    "pytorch_libtorch": "torch",
    "pytorch_safetensors": "torch",
    "tensorflow_lite": "litert",
    "tensorflow_savedmodel": "tensorflow",
}
"""Platform (the OIP string) -> the module of this package that loads it with ``load(manifest, directory, options)``."""


def load(manifest: Manifest, directory: Path, options: Options, closed: threading.Event | None = None) -> Runtime:
    """Load a version's files into memory, in a process of their own unless the model may run in the worker's. Blocks.

    Setting ``closed`` ends a process that is being started.

    Raises:
        ModelRejected: no runtime serves the manifest's platform, or the framework refuses the files.
    """
    _file(manifest)
    if manifest.platform != ONNX_PLATFORM or isolation_of(manifest) is Isolation.PROCESS:
        return ProcessRuntime(manifest, directory, options, closed)
    return load_here(manifest, directory, options)


def load_here(manifest: Manifest, directory: Path, options: Options) -> Runtime:
    """:func:`load` into this process.

    Raises:
        ModelRejected: as for :func:`load`, or the framework is not installed.
    """
    name = _file(manifest)
    if not name:
        brought = plugins.load(plugins.RUNTIMES, manifest.platform, "runtime", "platform")
        return plugins.Checked(brought.load(directory, threads=options.threads, device=options.device))
    try:
        module: Any = importlib.import_module(f"tether.worker.runtimes.{name}")
    except ImportError as error:
        raise ModelRejected(
            f"this worker cannot serve '{manifest.platform}': {error.name} is not installed; see the extras of the package"
        ) from error
    runtime: Runtime = module.load(manifest, directory, options)
    return runtime


def _file(manifest: Manifest) -> str:
    """Empty for a platform that another package brings."""
    name = FILES.get(manifest.platform, "")
    if not name and manifest.platform not in plugins.installed(plugins.RUNTIMES):
        raise ModelRejected(f"no runtime of this worker serves the platform '{manifest.platform}'")
    return name
