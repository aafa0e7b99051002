"""PyTorch models that ``torch.compile`` has compiled, all of it while they load: no request waits for a compiler.

What was not compiled then, because a request has a shape that nobody told of, runs as if nothing was compiled.
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
"""What to try for axes that the signature leaves open: all different, because PyTorch takes equal ones for the same axis."""


def load(manifest: Manifest, directory: Path, options: Options) -> pytorch.TorchModel:
    """Load and compile; what was compiled is kept where optimised graphs are.

    Raises:
        ModelRejected: PyTorch or the compiler refuses it, or no input is known that it runs with.
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
    """No compiler is needed from here on."""
    if seccomp.available():
        with suppress(OSError):  # where the process was not confined it may not confine itself so
            seccomp.install(seccomp.no_more_processes())


def _examples(model: pytorch.TorchModel, manifest: Manifest, warmups: tuple[Warmup, ...]) -> Iterator[dict[str, Array]]:
    """Inputs that show all that is to be compiled: several rows and then one, which PyTorch compiles apart, and the warm-ups."""
    rows = (2, 1) if manifest.batching.max_batch_size > 1 else (1,)
    tried = (_axes(manifest, sizes()) for sizes in _SIZES)
    shapes = next((axes for axes in tried if _runs(model, manifest, Warmup(rows[0], shapes=axes))), None)
    if shapes is None and not warmups:
        raise ModelRejected(
            "no shapes are known that the model runs with, so nothing can be compiled; name some in 'warmup'",
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
    """Whether the model takes such inputs when it is not compiled."""
    try:
        with torch.compiler.set_stance("force_eager"):
            model.run(warmup_inputs(manifest, warmup), ())
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a model raises what it likes
        return False
    return True


def _compile(model: pytorch.TorchModel, inputs: dict[str, Array]) -> None:
    try:
        model.run(inputs, ())
    except (InferenceFailed, MemoryError):
        raise
    except Exception as error:
        raise ModelRejected(f"the model cannot be compiled: {_words(error)}", field="compile") from error


def _words(error: Exception) -> str:
    """What the compiler complained of first, or else what PyTorch did, without what could be a path."""
    inner = getattr(error, "inner_exception", error)
    lines = str(getattr(inner, "output", "")).splitlines() or str(inner).splitlines() or [""]
    line = next((line for line in lines if "error" in line or "exhausted" in line), lines[0])
    return f"{type(inner).__name__}: {' '.join(word for word in line.split() if '/' not in word)[:300]}"


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] != _LOCKS)


def _unpack(content: bytes, folder: Path) -> set[str]:
    """Put what was kept where PyTorch looks for it; the names."""
    found = codec.unpack(content)
    for name, data in found:
        path = folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
    return {name for name, _ in found}
