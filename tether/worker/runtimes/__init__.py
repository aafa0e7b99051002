"""One file per framework, and the one place that knows which file serves which platform, and in whose process."""

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
"""Platform (the OIP string) -> the module of this package that loads it with ``load(manifest, directory, options)``."""

_LATE = {
    "pytorch_export": ("torch.export.pt2_archive._package", "torch.export._unlift"),
    "pytorch_safetensors": ("safetensors.torch",),
}
"""Platform -> what its framework imports only when it loads a file, which can take longer than the load."""

Load = Callable[[Path, Options], Runtime]
"""Loads a version from the folder of its files."""


Running = Callable[[], AbstractContextManager[None]]


class PreparedRuntime(Protocol):
    """A runtime for which everything is there but its files."""

    def load(self) -> Runtime:
        """The files are whole and verified. Blocks.

        Raises:
            ModelRejected: the framework refuses them.
        """

    def end(self) -> None:
        """Fail the warm-up run in this process, also one that begins later; elsewhere the load has a time of its own."""

    def close(self) -> None:
        """Whatever it has come to, the runtime included."""


class _InProcessRuntime:
    """Begun in this process."""

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
        """What was imported stays."""
        if self._loaded is not None:
            self._loaded.close()


class _Noted:
    """A runtime in this process: it is known while it runs."""

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
    """Do what needs no files of a version yet: start its process unless it may run in the worker's, import its framework. Blocks.

    Nothing is read from ``directory``, which must be there: a process can be allowed to read only what exists. Setting ``closed`` ends a process that is being started. ``running`` is entered for as
    long as the version is loaded or run in this process.

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
    """Import what serves a version into this process.

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
            f"this worker cannot serve '{manifest.platform}': {error.name} is not installed; see the extras of the package"
        ) from error
    for late in _LATE.get(manifest.platform, ()):
        with suppress(ImportError):  # a release that has no such part imports at the load what it has instead
            importlib.import_module(late)
    return partial(module.load, manifest)


def _file(manifest: Manifest) -> str:
    """Empty for a platform that another package brings."""
    name = FILES.get(manifest.platform, "")
    if not name and manifest.platform not in plugins.installed(plugins.RUNTIMES):
        raise ModelRejected(f"no runtime of this worker serves the platform '{manifest.platform}'")
    return name
