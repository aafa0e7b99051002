"""Jobs as runs: joined with others of equal shape, cut when one has more rows than a run takes, and put together again.
Pure: no time, no I/O.

Rows of different jobs share a run only where a version is batched. Each run of such a version is looked at: an output
whose first axis is not the run's rows shows that the version does not keep rows apart. Then no answer is taken from a
joined run; its jobs are run whole, each by itself.
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
    """A job and its inputs as arrays, which are made once for all of its segments."""

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
    """What goes through a model at once. Not ``batched``: one job as it came, whatever its first axes mean."""

    segments: tuple[Segment, ...]
    batched: bool

    @property
    def rows(self) -> int:
        """1 for a job as it came."""
        return sum([segment.stop - segment.start for segment in self.segments]) if self.batched else 1

    @property
    def jobs(self) -> float:
        """How many jobs' work it is; a segment counts as its part of one."""
        parts = [
            (segment.stop - segment.start) / segment.source.rows if segment.source.rows else 1.0
            for segment in self.segments
        ]
        return sum(parts) if self.batched else 1.0

    @property
    def own(self) -> bool:
        """Whether it is all of one job and nothing else."""
        return len(self.segments) == 1 and (not self.batched or self.segments[0].whole)


class Done(NamedTuple):
    """One result for each segment of a run; None: run the job whole. ``mixed``: what shows that rows are not kept apart."""

    results: list[Result | None]
    mixed: str = ""


def rows_of(job: Job) -> int:
    """Rows that a job takes of a run; 1 when its inputs share no first axis."""
    rows = _shared_rows(job)
    return 1 if rows < 0 else rows


def _shared_rows(job: Job) -> int:
    """Length of the first axis that all inputs share; -1 when they share none."""
    firsts = {tensor.shape[0] if tensor.shape else -1 for tensor in job.inputs}
    return firsts.pop() if len(firsts) == 1 else -1


def should_wait_for_more(jobs: Sequence[Job], most: int, preferred: Sequence[int]) -> bool:
    """Whether a run of these jobs is worth waiting for more: it is neither full nor has one of the ``preferred`` sizes
    (ascending) of rows."""
    rows = sum(map(rows_of, jobs))
    return rows < (preferred[-1] if preferred else most) and rows not in preferred


def key_of(job: Job) -> Key:
    """Jobs of equal keys can share a run: shapes but for rows, and wanted outputs."""
    return (job.outputs, *[(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in job.inputs])


def run(runtime: Runtime, wanted: Run) -> Done:
    """Run segments that belong together; one result each, in order.

    When a joined run fails, every segment runs by itself, so that only the guilty one fails.
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
    """Puts the results of one job's segments together, as their runs end in any order."""

    def __init__(self, source: Source) -> None:
        self._left = max(source.rows, 0)
        self._bytes = 0
        self._parts: list[tuple[int, tuple[Tensor, ...]]] = []

    def add(self, segment: Segment, outputs: tuple[Tensor, ...]) -> int:
        """Bytes of the outputs so far."""
        self._parts.append((segment.start, outputs))
        self._left -= max(segment.stop - segment.start, 0)
        self._bytes += sum([len(tensor.data) for tensor in outputs])
        return self._bytes

    @property
    def complete(self) -> bool:
        """Whether every segment is there."""
        return self._left <= 0

    def together(self) -> tuple[tuple[Tensor, ...], str]:
        """The outputs one after the other; or what shows that they are not the job's rows."""
        outputs = [outputs for _, outputs in sorted(self._parts, key=lambda part: part[0])]
        if len(outputs) == 1:
            return outputs[0], ""
        columns = list(zip(*outputs, strict=True))
        mixed = next(filter(None, map(_unlike, columns)), "")
        return (() if mixed else tuple([_concatenated(tensors) for tensors in columns])), mixed


def _unlike(parts: Sequence[Tensor]) -> str:
    """Why one output of all the parts of a job does not fit together; empty when it does."""
    first = parts[0]
    for part in parts[1:]:
        if (part.datatype, part.shape[1:]) != (first.datatype, first.shape[1:]):
            return f"output '{first.name}' had rows of the shapes {list(first.shape[1:])} and {list(part.shape[1:])}"
    return ""


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    shape = (sum([part.shape[0] for part in parts]), *first.shape[1:])
    return Tensor(first.name, first.datatype, shape, b"".join([part.data for part in parts]))
