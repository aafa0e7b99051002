"""Compiles PyTorch models with ``torch.compile`` while they load: no request waits for a compiler.

A request with a shape that was not compiled runs uncompiled.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from tether.domain.manifest import Manifest
from tether.domain.tensor import Array
from tether.errors import InferenceFailed, ModelRejected
from tether.frameworks import pytorch
from tether.model.config import Warmup
from tether.sandbox import seccomp
from tether.storage.model_files import version_digest
from tether.wire import codec
from tether.worker.runtimes.compiler_env import FOLDER
from tether.worker.runtimes.graph_cache import cache_beside, key_of
from tether.worker.runtimes.process_runtime import Options
from tether.worker.runtimes.warmup import warmup_inputs

_LOCKS = "locks"
_SIZES = (lambda: itertools.count(3), lambda: itertools.repeat(3), lambda: itertools.repeat(1))
"""Lengths to try for open axes: all different first, because PyTorch treats equal ones as the same axis."""


def load(manifest: Manifest, directory: Path, options: Options) -> pytorch.TorchModel:
    """Load and compile; store compiled code in the graph cache.

    Raises:
        ModelRejected: PyTorch or the compiler refuses it, or no working input shape is known.
    """
    torch._dynamo.config.recompile_limit = 2 * len(options.warmup) + 8  # noqa: SLF001 - it has no public name
    wrap = partial(torch.compile, dynamic=True)
    model = pytorch.load(directory, threads=options.threads, device=options.device, wrap=wrap)
    cache = cache_beside(directory, options.graph_cache, options.graph_cache_mb)
    key = key_of(version_digest(manifest), torch.__version__, "compile", options.device, str(options.threads))
    folder = Path(os.environ[FOLDER])
    content = cache.read(key) if cache is not None else None
    before = _unpack(content, folder) if content is not None else set()
    for inputs in _examples(model, manifest, options.warmup):
        _compile(model, inputs)
    torch.compiler.set_stance("eager_on_recompile")
    _start_no_more()
    if cache is not None and before != set(_files(folder)):
        made = codec.pack([(name, (folder / name).read_bytes()) for name in _files(folder)])
        draft = cache.draft(len(made))
        if draft is not None:
            draft.write_bytes(made)
            cache.keep(key, draft)
    return model


def _start_no_more() -> None:
    """Forbid new processes: no compiler is needed from now on."""
    if seccomp.available():
        with suppress(OSError):  # an unconfined process may not be able to confine itself
            seccomp.install(seccomp.no_more_processes())


def _examples(model: pytorch.TorchModel, manifest: Manifest, warmups: tuple[Warmup, ...]) -> Iterator[dict[str, Array]]:
    """Yield inputs that cover all code to compile: several rows, one row, and the warm-ups."""
    rows = (2, 1) if manifest.batching.max_batch_size > 1 else (1,)
    tried = (_axes(manifest, sizes()) for sizes in _SIZES)
    shapes = next((axes for axes in tried if _runs(model, manifest, Warmup(rows[0], shapes=axes))), None)
    if shapes is None and not warmups:
        raise ModelRejected(
            "no input shapes are known that the model runs with, so it cannot be compiled; set some in 'warmup'",
            field="warmup",
        )
    if shapes is not None:
        for count in rows:
            yield warmup_inputs(manifest, Warmup(count, shapes=shapes))
    for number, warmup in enumerate(warmups):
        yield warmup_inputs(manifest, warmup, f"warmup[{number}]")


def _axes(manifest: Manifest, sizes: Iterator[int]) -> dict[str, tuple[int, ...]]:
    first = 1 if manifest.batching.max_batch_size else 0
    return {
        spec.name: tuple(next(sizes) if axis == -1 else axis for axis in spec.shape[first:]) for spec in manifest.inputs
    }


def _runs(model: pytorch.TorchModel, manifest: Manifest, warmup: Warmup) -> bool:
    """Return True if the uncompiled model accepts such inputs."""
    try:
        with torch.compiler.set_stance("force_eager"):
            model.run(warmup_inputs(manifest, warmup), ())
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a model may raise anything
        return False
    return True


def _compile(model: pytorch.TorchModel, inputs: dict[str, Array]) -> None:
    try:
        model.run(inputs, ())
    except (InferenceFailed, MemoryError):
        raise
    except Exception as error:
        raise ModelRejected(f"cannot compile the model: {_words(error)}", field="compile") from error


def _words(error: Exception) -> str:
    """Return the compiler's first complaint, or PyTorch's message, without words that could be paths."""
    inner = getattr(error, "inner_exception", error)
    lines = str(getattr(inner, "output", "")).splitlines() or str(inner).splitlines() or [""]
    line = next((line for line in lines if "error" in line or "exhausted" in line), lines[0])
    return f"{type(inner).__name__}: {' '.join(word for word in line.split() if '/' not in word)[:300]}"


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] != _LOCKS)


def _unpack(content: bytes, folder: Path) -> set[str]:
    """Unpack cached code to where PyTorch reads it; return the file names."""
    found = codec.unpack(content)
    for name, data in found:
        path = folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
    return {name for name, _ in found}
