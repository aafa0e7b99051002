"""Runs a model a few times to check that it runs, and whether anything contradicts batching across callers.

Rows of different callers share a run if that is proven from the model's graph
(:mod:`tether.frameworks.row_proof.prover`) or declared by its publisher. Trial runs can only disprove it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES
from tether.errors import InspectionLimitExceeded
from tether.frameworks.row_proof.prover import RowProof
from tether.model import sample as samples
from tether.modelstore.inspection import row_trials, sandbox
from tether.modelstore.inspection.inspector import MORE, SAMPLE, TRYING, Inspection, InspectionReport, Tell
from tether.modelstore.inspection.row_trials import Run, Tried, trial

BATCH_BYTES = 8 << 20
"""Maximum bytes of inputs and outputs of one automatic batch."""
LARGEST_BATCH = 512
LARGEST_GUESS = 32
"""Maximum rows if an axis besides the first is open, so that the row size is unknown."""

NO_PROOF = RowProof(independent=False)
"""Note on a model without a graph: nothing is known of its rows."""
UNTRIED = "its rows are proven to be independent; no made-up inputs were found that it accepts"
NO_FREE_AXIS = "not every input and output has a free first axis"


class _Named(NamedTuple):
    """Signature to compare a sample with."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    name: str = ""
    platform: str = ""


class Model(NamedTuple):
    """A model to try: its run function and its signature."""

    run: Run
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def judge(
    model: Model,
    directory: Path,
    tell: Tell,
    *,
    proof: RowProof = NO_PROOF,
    compare: bool = True,
    words: Callable[[Exception], str] = row_trials.words,
) -> Inspection:
    """Try a model of ``directory`` with its sample and with generated inputs, and decide on batching.

    A failure with generated inputs counts as not tried. ``tell`` receives what is known so far. ``compare``:
    compare
    rows alone with the same rows together. ``words`` formats an error.

    Raises:
        ModelRejected: an input is too large to try, the model fails on its sample, or needs too much memory.
        OutputMisfit: its outputs do not match their declaration.
    """
    sample = samples.read(directory, _Named(model.inputs))
    needed = tuple(spec for spec in model.inputs if not spec.optional)
    doing = TRYING if sample is None else SAMPLE
    tell(InspectionReport(doing=doing, inspection=_concluded(model, needed, proof, Tried(), f"{doing} did not finish")))
    tried = trial(
        model.run,
        needed,
        [spec.name for spec in model.outputs],
        rows=compare and _free(needed),
        sample=sample,
        ran=lambda found: tell(InspectionReport(doing=MORE, inspection=_concluded(model, needed, proof, Tried(found)))),
    )
    if tried.error is not None and sandbox.is_memory(tried.error):
        raise InspectionLimitExceeded(sandbox.MEMORY, field="file") from tried.error
    return _concluded(
        model, needed, proof, tried, "" if tried.error is None else f"{TRYING} failed: {words(tried.error)}"
    )


def _free(specs: Sequence[TensorSpec]) -> bool:
    return bool(specs) and all(spec.shape and spec.shape[0] == -1 for spec in specs)


def _concluded(
    model: Model, needed: tuple[TensorSpec, ...], proof: RowProof, tried: Tried, untried: str = ""
) -> Inspection:
    """Combine the trials, as far as they ran, with the proof."""
    outputs = _ranked(model.outputs, tried)
    found = Inspection(model.inputs, outputs, 0, untried=untried)
    if proof.independent:
        outputs = _with_rows(outputs)
    found = replace(found, outputs=outputs)
    if not _free(needed) or not _free(outputs):
        return replace(found, note=proof.reason or NO_FREE_AXIS)
    if tried.refuted:
        said = f"a trial run showed that rows depend on one another: {tried.refuted}"
        note = f"{proof.reason}; {said}" if proof.reason else said
        return replace(found, note=note, refuted=True)
    if not proof.independent:
        return replace(found, note=proof.reason)
    note = "" if tried.outputs is not None else UNTRIED
    return replace(found, max_batch_size=automatic_batch(needed, outputs), note=note)


def automatic_batch(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    """Return the default maximum rows of a run: a power of two whose tensors stay within ``BATCH_BYTES``."""
    specs = (*inputs, *outputs)
    width = sum(
        int(np.prod([max(axis, 1) for axis in spec.shape[1:]], dtype=np.float64)) * _item_size(spec) for spec in specs
    )
    largest = LARGEST_GUESS if any(-1 in spec.shape[1:] for spec in specs) else LARGEST_BATCH
    rows = max(1, min(largest, BATCH_BYTES // max(width, 1)))
    return int(1 << (rows.bit_length() - 1))


def _item_size(spec: TensorSpec) -> int:
    return 64 if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype].itemsize


def _ranked(outputs: Sequence[TensorSpec], tried: Tried) -> tuple[TensorSpec, ...]:
    """Return output specs with the observed rank where none is declared, and open axes for sizes that varied."""
    if tried.outputs is None:
        return tuple(outputs)
    return tuple(_seen(spec, np.shape(array)) for spec, array in zip(outputs, tried.outputs, strict=True))


def _seen(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    if not spec.shape and shape:
        return replace(spec, shape=(-1,) * len(shape))
    if len(spec.shape) != len(shape):
        return spec
    axes = (axis if axis in (-1, seen) else -1 for axis, seen in zip(spec.shape, shape, strict=True))
    return replace(spec, shape=tuple(axes))


def _with_rows(outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Correct outputs that an exporter declared with one row, where the graph proves that they have all rows."""
    return tuple(replace(spec, shape=(-1, *spec.shape[1:])) if spec.shape else spec for spec in outputs)
