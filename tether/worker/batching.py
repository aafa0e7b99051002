"""Jobs as runs: joined with others of equal shape, cut when one has more rows than a run takes, and put together again.
Pure: no time, no I/O.

Rows of different jobs share a run only where a version is batched. Each run of such a version is looked at: an output
whose first axis is not the run's rows shows that the version does not keep rows apart. Then no answer is taken from a
joined run; its jobs are run whole, each by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tether.errors import TetherError
from tether.job import Job
from tether.model import Batching
from tether.ports import Runtime
from tether.tensor import Array, Tensor, from_numpy, to_numpy

Key = tuple[object, ...]
Result = tuple[Tensor, ...] | TetherError
ALONE = Batching(0)
"""Every job whole and by itself."""


class Source:
    """A job and its inputs as arrays, which are made once for all of its pieces."""

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


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a job, which has the ``place`` among those that were planned together."""

    place: int
    source: Source
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.source.rows)


class Run(NamedTuple):
    """What goes through a model at once. Not ``batched``: one job as it came, whatever its first axes mean."""

    pieces: tuple[Piece, ...]
    batched: bool

    @property
    def rows(self) -> int:
        """1 for a job as it came."""
        return sum([piece.stop - piece.start for piece in self.pieces]) if self.batched else 1

    @property
    def jobs(self) -> float:
        """How many jobs' work it is; a piece counts as its part of one."""
        parts = [(piece.stop - piece.start) / piece.source.rows if piece.source.rows else 1.0 for piece in self.pieces]
        return sum(parts) if self.batched else 1.0

    @property
    def own(self) -> bool:
        """Whether it is all of one job and nothing else."""
        return len(self.pieces) == 1 and (not self.batched or self.pieces[0].whole)


class Done(NamedTuple):
    """One result for each piece of a run; None: run the job whole. ``mixed``: what shows that rows are not kept apart."""

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


def plan(jobs: Sequence[Job], batching: Batching) -> list[Run]:
    """``jobs`` as runs: equal shapes (but for rows) and outputs together, at most ``max_batch_size`` rows a run."""
    limit = batching.max_batch_size
    runs: list[list[Piece]] = []
    alone: list[Run] = []
    open_runs: dict[Key, tuple[list[Piece], int]] = {}
    for index, job in enumerate(jobs):
        source = Source(job)
        if not limit or source.rows < 0:
            alone.append(Run((Piece(index, source, 0, source.rows),), batched=False))
            continue
        cuts = range(0, max(source.rows - limit, 0), limit) if source.rows > limit else ()
        runs += [[Piece(index, source, start, start + limit)] for start in cuts]
        rest = Piece(index, source, len(cuts) * limit, source.rows)
        key, rows = key_of(job), rest.stop - rest.start
        members, filled = open_runs.get(key, ([], limit + 1))
        if filled + rows > limit:
            members, filled = [], 0
            runs.append(members)
        members.append(rest)
        open_runs[key] = (members, filled + rows)
    return [*alone, *[Run(tuple(members), batched=True) for members in runs]]


def wants_company(jobs: Sequence[Job], most: int, preferred: Sequence[int]) -> bool:
    """Whether a run of these jobs is worth waiting for more: it is neither full nor has one of the ``preferred`` sizes
    (ascending) of rows."""
    rows = sum(map(rows_of, jobs))
    return rows < (preferred[-1] if preferred else most) and rows not in preferred


def key_of(job: Job) -> Key:
    """Jobs of equal keys can share a run: shapes but for rows, and wanted outputs."""
    return (job.outputs, *[(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in job.inputs])


def run(runtime: Runtime, wanted: Run) -> Done:
    """Run pieces that belong together; one result each, in order.

    When a joined run fails, every piece runs by itself, so that only the guilty one fails.
    """
    try:
        return _run(runtime, wanted)
    except TetherError as error:
        if len(wanted.pieces) == 1:
            return Done([error])
    alone = [run(runtime, Run((piece,), wanted.batched)) for piece in wanted.pieces]
    return Done([done.results[0] for done in alone], next((done.mixed for done in alone if done.mixed), ""))


def _run(runtime: Runtime, wanted: Run) -> Done:
    job = wanted.pieces[0].source.job
    found = runtime.run(_inputs(wanted), job.outputs)
    outputs = [
        (name, np.asarray(array)) for name, array in zip(job.outputs or runtime.output_names, found, strict=True)
    ]
    mixed = _mixed(outputs, wanted.rows) if wanted.batched else ""
    if wanted.own:
        return Done([tuple([from_numpy(name, array) for name, array in outputs])], mixed)
    if mixed:
        return Done([None] * len(wanted.pieces), mixed)
    return Done(list(_split(outputs, wanted.pieces)))


def _inputs(wanted: Run) -> dict[str, Array]:
    names = [tensor.name for tensor in wanted.pieces[0].source.job.inputs]
    if wanted.own:
        return dict(zip(names, wanted.pieces[0].source.arrays, strict=True))
    parts = [[array[piece.start : piece.stop] for array in piece.source.arrays] for piece in wanted.pieces]
    return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}


def _mixed(outputs: Sequence[tuple[str, Array]], rows: int) -> str:
    for name, array in outputs:
        if not array.shape or array.shape[0] != rows:
            return f"output '{name}' had the shape {list(array.shape)} in a run of {rows} rows"
    return ""


def _split(outputs: Sequence[tuple[str, Array]], pieces: Sequence[Piece]) -> list[tuple[Tensor, ...]]:
    split: list[tuple[Tensor, ...]] = []
    start = 0
    for piece in pieces:
        end = start + piece.stop - piece.start
        split.append(tuple([from_numpy(name, array[start:end]) for name, array in outputs]))
        start = end
    return split


class Gathered:
    """Puts together the results of jobs that were planned together, as their runs end in any order."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._left = Counter(piece.place for wanted in runs for piece in wanted.pieces)
        self._parts: dict[int, list[tuple[int, Result | None]]] = {}
        self.joined = {piece.place for wanted in runs if not wanted.own for piece in wanted.pieces}
        """Jobs that share a run or are cut, by index."""
        self.mixed = ""
        """What shows that rows are not kept apart; empty as long as nothing does."""

    def add(self, wanted: Run, done: Done) -> dict[int, Result | None]:
        """Results of the jobs that are complete with this run, by index; None: run it whole."""
        self.mixed = self.mixed or done.mixed
        complete = {}
        for piece, result in zip(wanted.pieces, done.results, strict=True):
            self._parts.setdefault(piece.place, []).append((piece.start, result))
            self._left[piece.place] -= 1
            if not self._left[piece.place]:
                complete[piece.place] = self._put_together(self._parts.pop(piece.place))
        return complete

    def _put_together(self, parts: list[tuple[int, Result | None]]) -> Result | None:
        """The first error, or the outputs one after the other."""
        outputs: list[tuple[Tensor, ...]] = []
        for _, result in sorted(parts, key=lambda part: part[0]):
            if result is None or isinstance(result, TetherError):
                return result
            outputs.append(result)
        if len(outputs) == 1:
            return outputs[0]
        together = list(zip(*outputs, strict=True))
        self.mixed = self.mixed or next(filter(None, map(_unlike, together)), "")
        return None if self.mixed else tuple([_concatenated(tensors) for tensors in together])


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
