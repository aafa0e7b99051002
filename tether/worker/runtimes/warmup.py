"""Warm-up runs after a load: a slow or failing first run happens before the version is ready."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tether.domain.manifest import Manifest, TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array
from tether.errors import InferenceFailed, ModelRejected
from tether.frameworks.runtime import Runtime
from tether.model import sample as samples
from tether.model.config import Warmup

MAX_ELEMENTS = 1 << 26


def warm_up(runtime: Runtime, manifest: Manifest, warmups: tuple[Warmup, ...], directory: Path) -> None:
    """Run the version's sample from ``directory`` and then the configured warm-ups, in order. Blocks.

    Warm-ups use rows of the sample if there is one, unless they set shapes or random data.

    Raises:
        ModelRejected: a run failed, or its inputs cannot be built.
    """
    there = any(file.path == samples.PATH for file in manifest.files)
    sample = samples.read(directory, manifest) if there else None
    if sample is not None:
        _run(runtime, sample, 1, "the run of the version's sample")
    for number, warmup in enumerate(warmups):
        what = f"warmup[{number}]"
        own = None if sample is None or warmup.shapes or warmup.random else _rows(sample, manifest, warmup)
        _run(runtime, own or warmup_inputs(manifest, warmup, what), warmup.count, what)


def _run(runtime: Runtime, inputs: dict[str, Array], count: int, what: str) -> None:
    try:
        for _ in range(count):
            runtime.run(inputs, ())
    except InferenceFailed as error:
        raise ModelRejected(f"{what} failed: {error.message}", field="warmup") from error


def _rows(sample: dict[str, Array], manifest: Manifest, warmup: Warmup) -> dict[str, Array]:
    most = manifest.batching.max_batch_size
    names = [spec.name for spec in manifest.inputs if not spec.optional]
    return (samples.rows_of(sample, names, min(warmup.rows, most)) if most else None) or sample


def warmup_inputs(manifest: Manifest, warmup: Warmup, field: str = "warmup") -> dict[str, Array]:
    """Return arrays that fit the version's signature.

    Raises:
        ModelRejected: a shape does not fit it, or an input has more than ``MAX_ELEMENTS`` elements.
    """
    unknown = set(warmup.shapes) - {spec.name for spec in manifest.inputs}
    if unknown:
        raise ModelRejected(f"{field}.shapes has an unknown input '{min(unknown)[:64]}'", field="warmup")
    return {spec.name: _array(spec, manifest, warmup, field) for spec in manifest.inputs if not spec.optional}


def _array(spec: TensorSpec, manifest: Manifest, warmup: Warmup, field: str) -> Array:
    shape = _shape(spec, manifest, warmup, field)
    if math.prod(shape) > MAX_ELEMENTS:
        raise ModelRejected(f"{field}: input '{spec.name}' has more than {MAX_ELEMENTS} elements", field="warmup")
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=np.object_)
    dtype = NUMPY_DTYPES[spec.datatype]
    if not warmup.random:
        return np.zeros(shape, dtype)
    drawn = np.random.default_rng(len(spec.name))
    # whole numbers may be indices, and every table has an index 0
    values = drawn.standard_normal(shape) if dtype.kind in "fV" else drawn.integers(0, 2, shape)
    return values.astype(dtype)


def _shape(spec: TensorSpec, manifest: Manifest, warmup: Warmup, field: str) -> tuple[int, ...]:
    batched = bool(manifest.batching.max_batch_size)
    declared = spec.shape[1:] if batched else spec.shape
    wanted = warmup.shapes.get(spec.name, tuple(1 if axis == -1 else axis for axis in declared))
    fits = len(wanted) == len(declared) and all(axis in (-1, own) for axis, own in zip(declared, wanted, strict=True))
    if not fits:
        raise ModelRejected(
            f"{field}.shapes: input '{spec.name}' has shape {list(wanted)}; the model expects {list(declared)}"
            f"{' without the batch axis' if batched else ''}",
            field="warmup",
        )
    return (min(warmup.rows, manifest.batching.max_batch_size), *wanted) if batched else wanted
