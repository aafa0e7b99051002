"""Runs models with ONNX Runtime. The only importer of onnxruntime in the worker."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tether.domain.manifest import Manifest
from tether.domain.tensor import Array
from tether.errors import InferenceFailed, ModelRejected, ResultTooLarge
from tether.frameworks.onnx import messages
from tether.frameworks.onnx.library import onnxruntime
from tether.frameworks.onnx.values import from_value, to_text, to_value
from tether.storage.model_files import version_digest
from tether.storage.upload import MODEL_PATH
from tether.worker.runtimes.frames import LARGEST_FRAME
from tether.worker.runtimes.graph_cache import LARGEST, GraphCache, cache_beside, key_of
from tether.worker.runtimes.process_runtime import Options

log = logging.getLogger(__name__)

_WIDTHS = {
    f"tensor({kind})": width
    for width, kinds in {
        1: ("bool", "int8", "uint8"),
        2: ("int16", "uint16", "float16", "bfloat16"),
        4: ("int32", "uint32", "float"),
        8: ("int64", "uint64", "double"),
    }.items()
    for kind in kinds
}
"""Bytes of an element, by ONNX Runtime's type name."""

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"


class OnnxRuntime:
    """One ONNX Runtime session; see :class:`tether.frameworks.runtime.Runtime`."""

    def __init__(self, manifest: Manifest, directory: Path, options: Options) -> None:
        self._session: Any = _session(manifest, directory, options)
        self._outputs = tuple(spec.name for spec in manifest.outputs)
        self._text = {spec.name for spec in manifest.inputs if spec.datatype == "BYTES"}
        self._sizes = _known_sizes(self._session)
        self._largest = min(options.run_memory_mb << 20 or LARGEST_FRAME, LARGEST_FRAME)
        self._now: Any = None
        """Options of the active run."""
        self._ended = False
        self._has_bf16 = any(spec.datatype == "BF16" for spec in (*manifest.inputs, *manifest.outputs))

    @property
    def output_names(self) -> Sequence[str]:
        return self._outputs

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once and return ``outputs``; an empty list returns all in the model's order.

        Raises:
            InferenceFailed: ONNX Runtime refused the input, text is not UTF-8, or the run was ended.
            ResultTooLarge: by the input shapes, the outputs exceed the limit; nothing was run.
        """
        wanted = list(outputs or self._outputs)
        self._check_size(inputs, wanted)
        self._now = now = onnxruntime.RunOptions()
        if self._ended:
            now.terminate = True
        try:
            return self._run(inputs, wanted, now)
        finally:
            self._now = None

    def allow_runs(self) -> None:
        self._ended = False

    def end_run(self) -> None:
        self._ended = True
        now = self._now
        if now is not None:
            now.terminate = True

    def _check_size(self, inputs: Mapping[str, Array], wanted: list[str]) -> None:
        size = sum([self._sizes[name].of(inputs) for name in wanted if name in self._sizes])
        if size > self._largest:
            raise ResultTooLarge(
                f"the outputs of the run would take {size} bytes; the limit is {self._largest}: send fewer rows"
            )

    def _run(self, inputs: Mapping[str, Array], wanted: list[str], now: Any) -> list[Array]:
        feed = {name: _text(name, array) if name in self._text else array for name, array in inputs.items()}
        try:
            if self._has_bf16:
                return self._run_values(feed, wanted, now)
            found: list[Array] = self._session.run(wanted, feed, now)
        except Exception as error:
            if self._ended:
                raise InferenceFailed("the run was ended") from error
            raise InferenceFailed(f"the model failed: {messages.plain(str(error))}") from error
        return found

    def _run_values(self, feed: Mapping[str, Array], wanted: list[str], now: Any) -> list[Array]:
        values = {name: to_value(array) for name, array in feed.items()}
        return [from_value(value) for value in self._session.run_with_ort_values(wanted, values, now)]

    def close(self) -> None:
        self._session = None


class _Size(NamedTuple):
    """The size of an output as a product: fixed bytes times axes of inputs."""

    fixed: int
    axes: tuple[tuple[str, int], ...]

    def of(self, inputs: Mapping[str, Array]) -> int:
        return math.prod((self.fixed, *[inputs[name].shape[axis] for name, axis in self.axes]))


def _known_sizes(session: Any) -> dict[str, _Size]:
    """Return the sizes of outputs whose axes are all fixed or named like an axis of an input."""
    axes: dict[str, tuple[str, int]] = {}
    for given in session.get_inputs():
        for number, axis in enumerate(given.shape):
            if isinstance(axis, str):
                axes.setdefault(axis, (given.name, number))
    found = {}
    for output in session.get_outputs():
        width = _WIDTHS.get(output.type, 0)
        named = [axis for axis in output.shape if not isinstance(axis, int)]
        if width and all(axis in axes for axis in named):
            fixed = math.prod((width, *[axis for axis in output.shape if isinstance(axis, int)]))
            found[output.name] = _Size(fixed, tuple([axes[axis] for axis in named]))
    return found


def load(manifest: Manifest, directory: Path, options: Options) -> OnnxRuntime:
    """Return the runtime of an ONNX version."""
    return OnnxRuntime(manifest, directory, options)


def providers(device: str) -> list[str]:
    """Return ONNX Runtime's execution providers for ``auto``, ``cpu`` or ``cuda``, best first.

    Raises:
        ModelRejected: CUDA is required, and this ONNX Runtime does not support it.
    """
    there = _CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not there:
        raise ModelRejected(
            f"device 'cuda' is not available: this ONNX Runtime has no {_CUDA}; "
            "install onnxruntime-gpu, or set device to 'auto' or 'cpu'",
            field="kind",
        )
    return [_CUDA, _CPU] if there and device != "cpu" else [_CPU]


def _session(manifest: Manifest, directory: Path, options: Options) -> Any:
    chosen = providers(options.device)
    path = directory / _graph(manifest)
    try:
        cache = cache_beside(directory, options.graph_cache, options.graph_cache_mb)
        if cache is not None and chosen == [_CPU] and manifest.size <= LARGEST:
            session = _cached(manifest, path, options, cache)
        else:
            session = onnxruntime.InferenceSession(str(path), _settings(options), providers=chosen)
    except Exception as error:
        raise ModelRejected(f"ONNX Runtime refused the file: {type(error).__name__}") from error
    if options.device == "cuda" and _CUDA not in session.get_providers():
        raise ModelRejected(
            "device 'cuda' is not available: ONNX Runtime found no usable GPU; set device to 'auto' or 'cpu'",
            field="kind",
        )
    return session


def _settings(options: Options) -> Any:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = options.threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 4
    # an arena would keep the peak memory of all runs; runs are as fast without it
    made.enable_cpu_mem_arena = False
    if options.threads == 1:
        made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


def _cached(manifest: Manifest, path: Path, options: Options, cache: GraphCache) -> Any:
    """Return a CPU session of the cached optimised graph; optimise and cache it if there is none."""
    key = key_of(version_digest(manifest), onnxruntime.__version__, _CPU)
    content = cache.read(key)
    if content is not None:
        ready = _settings(options)
        ready.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return onnxruntime.InferenceSession(content, ready, providers=[_CPU])
        except Exception as error:  # noqa: BLE001 - the version's own file is loaded instead
            cache.drop(key, f"cannot be loaded ({type(error).__name__})")
    draft = cache.draft(manifest.size)
    if draft is not None:
        session = _written(path, options, draft)
        if session is not None:
            cache.keep(key, draft)
            return session
        draft.unlink(missing_ok=True)
    return onnxruntime.InferenceSession(str(path), _settings(options), providers=[_CPU])


def _written(path: Path, options: Options, draft: Path) -> Any:
    """Return a session whose optimised graph was written; None if graph or disk do not allow that."""
    writing = _settings(options)
    writing.optimized_model_filepath = str(draft)
    try:
        return onnxruntime.InferenceSession(str(path), writing, providers=[_CPU])
    except Exception as error:  # noqa: BLE001 - retried without it, which reports the reason
        log.info("could not write an optimised graph: %s", type(error).__name__, extra={"action": "graph_not_kept"})
        return None


def _graph(manifest: Manifest) -> str:
    """Return the file with the graph; ONNX Runtime finds weights in other files beside it."""
    paths = [file.path for file in manifest.files]
    return MODEL_PATH if MODEL_PATH in paths else paths[0]


def _text(name: str, array: Array) -> Array:
    try:
        return to_text(array)
    except UnicodeDecodeError as error:
        raise InferenceFailed(f"input '{name}' has bytes that are not UTF-8 text, as ONNX strings must be") from error
