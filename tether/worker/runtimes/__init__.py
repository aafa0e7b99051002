"""Model runtimes: one file per framework; this one maps platforms to them and chooses the process."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tether.domain.manifest import Isolation, Manifest, isolation_of
from tether.domain.tensor import Array
from tether.errors import ModelRejected
from tether.frameworks import plugins
from tether.frameworks.runtime import Endable, Runtime
from tether.sandbox import plan
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

ONNX_PLATFORM = "onnxruntime_onnx"

FILES = {
    ONNX_PLATFORM: "onnx",
    "python": "python_bundle",
    "pytorch_export": "torch",
    "pytorch_libtorch": "torch",
    "pytorch_safetensors": "torch",
    "tensorflow_lite": "litert",
    "tensorflow_savedmodel": "tensorflow",
}
"""Platform (OIP string) -> module of this package with ``load(manifest, directory, options)``."""

_LATE = {
    "pytorch_export": ("torch.export.pt2_archive._package", "torch.export._unlift"),
    "pytorch_safetensors": ("safetensors.torch",),
}
"""Platform -> modules that its framework imports only on a load, which can take longer than the load itself."""

Load = Callable[[Path, Options], Runtime]
"""Loads a version from its folder."""


Running = Callable[[], AbstractContextManager[None]]


class PreparedRuntime(Protocol):
    """A runtime that needs only its files."""

    def load(self) -> Runtime:
        """Load the complete, verified files. Blocks.

        Raises:
            ModelRejected: the framework refuses them.
        """

    def end(self) -> None:
        """Abort a warm-up in this process, also a later one; in other processes loads have a timeout."""

    def close(self) -> None:
        """Release everything, including the runtime."""


class _InProcessRuntime:
    """A runtime prepared in this process."""

    def __init__(self, manifest: Manifest, directory: Path, options: Options, running: Running) -> None:
        self._load = partial(prepare_here(manifest), directory, options)
        self._running = running
        self._loaded: _Noted | None = None
        self._over = False

    def load(self) -> Runtime:
        with self._running():
            self._loaded = _Noted(self._load(), self._running)
        if self._over:
            self._loaded.end_run()
        return self._loaded

    def end(self) -> None:
        self._over = True
        if self._loaded is not None:
            self._loaded.end_run()

    def close(self) -> None:
        """Do nothing: imports stay."""
        if self._loaded is not None:
            self._loaded.close()


class _Noted:
    """A runtime in this process whose runs are recorded."""

    def __init__(self, runtime: Runtime, running: Running) -> None:
        self._runtime = runtime
        self._running = running
        self._endable = runtime if isinstance(runtime, Endable) else None

    @property
    def output_names(self) -> Sequence[str]:
        return self._runtime.output_names

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        with self._running():
            return self._runtime.run(inputs, outputs)

    def allow_runs(self) -> None:
        if self._endable is not None:
            self._endable.allow_runs()

    def end_run(self) -> None:
        if self._endable is not None:
            self._endable.end_run()

    def close(self) -> None:
        self._runtime.close()


def begin(
    manifest: Manifest,
    directory: Path,
    options: Options,
    closed: threading.Event | None = None,
    running: Running = nullcontext,
) -> PreparedRuntime:
    """Prepare a version without its files: start its process, or import its framework in this one. Blocks.

    ``directory`` must exist, because a process can be allowed to read only existing folders; nothing is read
    from it. Setting ``closed`` ends a process that is being started. ``running`` is entered while the version
    is loaded or runs in this process.

    Raises:
        ModelRejected: no runtime serves the manifest's platform, or it is a program that the kernel cannot confine.
    """
    _file(manifest)
    plan.check(options.confinement, manifest.platform)
    if manifest.platform != ONNX_PLATFORM or isolation_of(manifest) is Isolation.PROCESS:
        return ProcessRuntime(manifest, directory, options, closed)
    return _InProcessRuntime(manifest, directory, options, running)


def load(manifest: Manifest, directory: Path, options: Options, closed: threading.Event | None = None) -> Runtime:
    """Load a version's files into memory. Blocks.

    Raises:
        ModelRejected: as for :func:`begin`, or the framework refuses the files.
    """
    return begin(manifest, directory, options, closed).load()


def prepare_here(manifest: Manifest) -> Load:
    """Import the runtime of a version into this process.

    Raises:
        ModelRejected: no runtime serves the manifest's platform, or the framework is not installed.
    """
    name = _file(manifest)
    if not name:
        brought = plugins.load(plugins.RUNTIMES, manifest.platform, "runtime", "platform")
        return lambda directory, options: plugins.Checked(
            brought.load(directory, threads=options.threads, device=options.device)
        )
    try:
        module: Any = importlib.import_module(f"tether.worker.runtimes.{name}")
    except ImportError as error:
        raise ModelRejected(
            f"this worker cannot serve platform '{manifest.platform}': {error.name} is missing; install the extra for it"
        ) from error
    for late in _LATE.get(manifest.platform, ()):
        with suppress(ImportError):  # a release without this module imports its replacement on load
            importlib.import_module(late)
    return partial(module.load, manifest)


def _file(manifest: Manifest) -> str:
    """Return the module name; empty for a platform of a plugin."""
    name = FILES.get(manifest.platform, "")
    if not name and manifest.platform not in plugins.installed(plugins.RUNTIMES):
        raise ModelRejected(f"this worker has no runtime for platform '{manifest.platform}'")
    return name
