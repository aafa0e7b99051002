"""Combines jobs into runs: joins jobs of equal shape, splits large ones, and reassembles the results. Pure.

Rows of different jobs share a run only if the version is batched. Each run of such a version is checked: an
output whose first axis is not the run's rows shows that the model mixes rows. Then the results of a joined
run are discarded, and its jobs run whole, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tether.domain.job import Job
from tether.domain.tensor import Array, Tensor, from_numpy, to_numpy
from tether.errors import TetherError
from tether.frameworks.runtime import Runtime

Key = tuple[object, ...]
Result = tuple[Tensor, ...] | TetherError


class Source:
    """A job and its inputs as arrays, which all of its segments share."""

    __slots__ = ("_arrays", "job", "rows")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows = _shared_rows(job)
        self._arrays: list[Array] | None = None

    @property
    def arrays(self) -> list[Array]:
        if self._arrays is None:
            self._arrays = [to_numpy(tensor) for tensor in self.job.inputs]
        return self._arrays


class Segment(NamedTuple):
    """Rows ``start`` to ``stop`` of a job."""

    source: Source
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.source.rows)


class Run(NamedTuple):
    """Input of one model call. Not ``batched``: one job as it is, whatever its first axes mean."""

    segments: tuple[Segment, ...]
    batched: bool

    @property
    def rows(self) -> int:
        """Return the rows of the run; 1 for a job that is not batched."""
        return sum([segment.stop - segment.start for segment in self.segments]) if self.batched else 1

    @property
    def jobs(self) -> float:
        """Return the number of jobs in the run; a segment counts as its fraction of a job."""
        parts = [
            (segment.stop - segment.start) / segment.source.rows if segment.source.rows else 1.0
            for segment in self.segments
        ]
        return sum(parts) if self.batched else 1.0

    @property
    def own(self) -> bool:
        """Return True if the run is exactly one whole job."""
        return len(self.segments) == 1 and (not self.batched or self.segments[0].whole)


class Done(NamedTuple):
    """One result for each segment; None: run the job whole. ``mixed``: evidence of mixed rows."""

    results: list[Result | None]
    mixed: str = ""


def rows_of(job: Job) -> int:
    """Return the rows of a job in a run; 1 if its inputs share no first axis."""
    rows = _shared_rows(job)
    return 1 if rows < 0 else rows


def _shared_rows(job: Job) -> int:
    """Return the length of the first axis that all inputs share; -1 if they share none."""
    firsts = {tensor.shape[0] if tensor.shape else -1 for tensor in job.inputs}
    return firsts.pop() if len(firsts) == 1 else -1


def should_wait_for_more(jobs: Sequence[Job], most: int, preferred: Sequence[int]) -> bool:
    """Return True if the run is neither full nor has one of the ``preferred`` sizes (ascending) in rows."""
    rows = sum(map(rows_of, jobs))
    return rows < (preferred[-1] if preferred else most) and rows not in preferred


def key_of(job: Job) -> Key:
    """Return the key of a job; jobs of equal keys can share a run: equal shapes except rows, equal outputs."""
    return (job.outputs, *[(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in job.inputs])


def run(runtime: Runtime, wanted: Run) -> Done:
    """Run segments that belong together; return one result each, in order.

    If a joined run fails, every segment runs alone, so that only the faulty one fails.
    """
    try:
        return _run(runtime, wanted)
    except TetherError as error:
        if len(wanted.segments) == 1:
            return Done([error])
    alone = [run(runtime, Run((segment,), wanted.batched)) for segment in wanted.segments]
    return Done([done.results[0] for done in alone], next((done.mixed for done in alone if done.mixed), ""))


def _run(runtime: Runtime, wanted: Run) -> Done:
    job = wanted.segments[0].source.job
    found = runtime.run(_inputs(wanted), job.outputs)
    outputs = [
        (name, np.asarray(array)) for name, array in zip(job.outputs or runtime.output_names, found, strict=True)
    ]
    mixed = _mixed(outputs, wanted.rows) if wanted.batched else ""
    if wanted.own:
        return Done([tuple([from_numpy(name, array) for name, array in outputs])], mixed)
    if mixed:
        return Done([None] * len(wanted.segments), mixed)
    return Done(list(_split(outputs, wanted.segments)))


def _inputs(wanted: Run) -> dict[str, Array]:
    names = [tensor.name for tensor in wanted.segments[0].source.job.inputs]
    if wanted.own:
        return dict(zip(names, wanted.segments[0].source.arrays, strict=True))
    parts = [[array[segment.start : segment.stop] for array in segment.source.arrays] for segment in wanted.segments]
    return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}


def _mixed(outputs: Sequence[tuple[str, Array]], rows: int) -> str:
    for name, array in outputs:
        if not array.shape or array.shape[0] != rows:
            return f"output '{name}' had the shape {list(array.shape)} in a run of {rows} rows"
    return ""


def _split(outputs: Sequence[tuple[str, Array]], segments: Sequence[Segment]) -> list[tuple[Tensor, ...]]:
    split: list[tuple[Tensor, ...]] = []
    start = 0
    for segment in segments:
        end = start + segment.stop - segment.start
        split.append(tuple([from_numpy(name, array[start:end]) for name, array in outputs]))
        start = end
    return split


class Parts:
    """Reassembles the results of one job's segments, which finish in any order."""

    def __init__(self, source: Source) -> None:
        self._left = max(source.rows, 0)
        self._bytes = 0
        self._parts: list[tuple[int, tuple[Tensor, ...]]] = []

    def add(self, segment: Segment, outputs: tuple[Tensor, ...]) -> int:
        """Add a segment's outputs; return the bytes of all outputs so far."""
        self._parts.append((segment.start, outputs))
        self._left -= max(segment.stop - segment.start, 0)
        self._bytes += sum([len(tensor.data) for tensor in outputs])
        return self._bytes

    @property
    def complete(self) -> bool:
        """Return True if all segments are present."""
        return self._left <= 0

    def together(self) -> tuple[tuple[Tensor, ...], str]:
        """Return the concatenated outputs, or evidence that they are not the job's rows."""
        outputs = [outputs for _, outputs in sorted(self._parts, key=lambda part: part[0])]
        if len(outputs) == 1:
            return outputs[0], ""
        columns = list(zip(*outputs, strict=True))
        mixed = next(filter(None, map(_unlike, columns)), "")
        return (() if mixed else tuple([_concatenated(tensors) for tensors in columns])), mixed


def _unlike(parts: Sequence[Tensor]) -> str:
    """Return why the parts of one output cannot be concatenated; empty if they can."""
    first = parts[0]
    for part in parts[1:]:
        if (part.datatype, part.shape[1:]) != (first.datatype, first.shape[1:]):
            return f"output '{first.name}' had rows of the shapes {list(first.shape[1:])} and {list(part.shape[1:])}"
    return ""


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    shape = (sum([part.shape[0] for part in parts]), *first.shape[1:])
    return Tensor(first.name, first.datatype, shape, b"".join([part.data for part in parts]))
