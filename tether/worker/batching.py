"""Joining jobs into runs and splitting the outputs again. Pure: no time, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tether.errors import InferenceFailed, TetherError
from tether.job import Job
from tether.model import Batching
from tether.ports import Runtime
from tether.tensor import Array, Tensor, from_numpy, to_numpy

Key = tuple[object, ...]
Result = tuple[Tensor, ...] | TetherError


def plan(jobs: Sequence[Job], batching: Batching) -> list[list[int]]:
    """Indices of ``jobs`` as runs: equal shapes (but for rows) and outputs together, at most so many rows a run."""
    limit = batching.max_batch_size
    if not limit:
        return [[index] for index in range(len(jobs))]
    runs: list[list[int]] = []
    open_runs: dict[Key, tuple[list[int], int]] = {}
    for index, job in enumerate(jobs):
        key, rows = _key(job), _rows(job)
        members, filled = open_runs.get(key, ([], limit + 1))
        if filled + rows > limit:
            members, filled = [], 0
            runs.append(members)
        members.append(index)
        open_runs[key] = (members, filled + rows)
    return runs


def wants_company(jobs: Sequence[Job], most: int, preferred: Sequence[int]) -> bool:
    """Whether a run of these jobs is worth waiting for more: it is neither full nor has one of the ``preferred`` sizes
    (ascending) of rows."""
    rows = sum(map(_rows, jobs))
    return rows < (preferred[-1] if preferred else most) and rows not in preferred


def _key(job: Job) -> Key:
    return (job.outputs, *[(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in job.inputs])


def _rows(job: Job) -> int:
    return job.inputs[0].shape[0] if job.inputs and job.inputs[0].shape else 1


def run(runtime: Runtime, jobs: Sequence[Job]) -> list[Result]:
    """Run jobs that belong together; one result each, in order.

    When a joined run fails, every job runs by itself, so that only the guilty one fails.
    """
    try:
        return list(_run_joined(runtime, jobs))
    except TetherError as error:
        if len(jobs) == 1:
            return [error]
    return [result for job in jobs for result in run(runtime, [job])]


def _run_joined(runtime: Runtime, jobs: Sequence[Job]) -> Sequence[tuple[Tensor, ...]]:
    names = jobs[0].outputs
    if len(jobs) == 1:
        arrays = {tensor.name: to_numpy(tensor) for tensor in jobs[0].inputs}
        found = runtime.run(arrays, names)
        return [_named(runtime, names, found)]
    rows = [_rows(job) for job in jobs]
    found = runtime.run(_joined(jobs), names)
    return _split(_named_arrays(runtime, names, found), rows)


def _joined(jobs: Sequence[Job]) -> dict[str, Array]:
    first = jobs[0].inputs
    return {
        tensor.name: np.concatenate([to_numpy(job.inputs[position]) for job in jobs])
        for position, tensor in enumerate(first)
    }


def _named_arrays(runtime: Runtime, names: Sequence[str], found: Sequence[Array]) -> list[tuple[str, Array]]:
    return list(zip(names or runtime.output_names, found, strict=True))


def _named(runtime: Runtime, names: Sequence[str], found: Sequence[Array]) -> tuple[Tensor, ...]:
    return tuple([from_numpy(name, np.asarray(array)) for name, array in _named_arrays(runtime, names, found)])


def _split(outputs: Sequence[tuple[str, Array]], rows: Sequence[int]) -> list[tuple[Tensor, ...]]:
    total = sum(rows)
    for name, array in outputs:
        if not array.shape or array.shape[0] != total:
            raise InferenceFailed(
                f"output '{name}' has shape {list(array.shape)} for a batch of {total} rows; "
                "the model does not keep rows apart: set max_batch_size to 0"
            )
    split: list[tuple[Tensor, ...]] = []
    start = 0
    for count in rows:
        end = start + count
        split.append(tuple([from_numpy(name, array[start:end]) for name, array in outputs]))
        start = end
    return split
