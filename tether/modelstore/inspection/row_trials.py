"""Runs a model with generated rows, alone and together. Trials can disprove row independence, never prove it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES
from tether.errors import ModelRejected, OutputMisfit, TetherError
from tether.model.sample import rows_of

MAX_ELEMENTS = 1 << 26
"""Maximum elements of one input of one run."""
SECONDS = 10.0
"""Seconds after which no further run starts."""
SIZES = (1, 2, 7, 16, 64)
"""Sizes for open axes except the first."""
SIZES_TRIED = 3
"""Number of sizes tried of those that the model accepts."""
SCALES = (1.0, 1e-6, 1e6, 1e-3, 1e3, 30.0)
"""Scales of the rows of one run, in turn."""
KINDS = 5
"""Kinds of whole numbers and texts: see :func:`_whole` and :func:`_texts`."""
TOLERANCE = 1e-2
"""Tolerance relative to the largest number in a row's output: run size changes the order of additions."""
ULP = 1e-6
BF16 = NUMPY_DTYPES["BF16"]

Arrays = Mapping[str, Any]
Run = Callable[[Arrays], list[Any]]
"""One run of a model: inputs by name, outputs in signature order."""


@dataclass(frozen=True, slots=True)
class Tried:
    """``outputs`` of the first successful run, or the ``error`` of the first failure if none succeeded.

    ``refuted`` describes how a row's output differed alone and among others.

    ``refuted`` says what differed between a row alone and the same row among others.
    """

    outputs: list[Any] | None = None
    error: Exception | None = None
    refuted: str = ""


def trial(
    run: Run,
    inputs: Sequence[TensorSpec],
    names: Sequence[str],
    *,
    rows: bool,
    sample: Arrays | None = None,
    ran: Callable[[list[Any]], None] = lambda _outputs: None,
) -> Tried:
    """Run the model with rows of many kinds; with ``rows`` compare each run of several with runs of one.

    ``names`` are the output names. A ``sample`` of real inputs runs before generated ones. ``ran`` receives
    the outputs of the first successful run.

    Raises:
        ModelRejected: an input is too large to try, or the model fails on the sample.
        OutputMisfit: its outputs do not match their declaration.
        MemoryError: a run needs more memory than available.
    """
    trials = _Trials(run, names, time.monotonic() + SECONDS, ran)
    if sample is not None:
        trials.real(sample, [spec.name for spec in inputs], rows=rows)
    for size in SIZES if any(-1 in spec.shape[1:] for spec in inputs) else SIZES[:1]:
        if trials.sizes == SIZES_TRIED or trials.over(rows=rows):
            break
        trials.size(_rows(inputs, size, len(SCALES) - trials.sizes if rows else 1), rows=rows)
    return Tried(trials.outputs, None if trials.outputs is not None else trials.error, trials.refuted)


class _Trials:
    def __init__(self, run: Run, names: Sequence[str], ends: float, ran: Callable[[list[Any]], None]) -> None:
        self._run = run
        self._ran = ran
        self._names = names
        self._ends = ends
        self.outputs: list[Any] | None = None
        self.error: Exception | None = None
        self.refuted = ""
        self.sizes = 0
        """Sizes of open axes that the model accepted."""

    def over(self, *, rows: bool) -> bool:
        """Return whether nothing more can be learned, or not in the time left."""
        return bool(self.refuted) or (self.outputs is not None and (not rows or time.monotonic() > self._ends))

    def real(self, sample: Arrays, names: Sequence[str], *, rows: bool) -> None:
        """Run the sample unchanged and, with ``rows``, with as many of its rows as generated inputs have."""
        found = self._try(sample)
        if isinstance(found, Exception):
            raise ModelRejected(f"the model fails on the sample: {words(found)}", field="sample") from found
        some = rows_of(dict(sample), names, len(SCALES)) if rows else None
        if some is not None:
            self.size([some], rows=True)

    def size(self, kinds: Iterable[Arrays], *, rows: bool) -> None:
        taken = 0
        for arrays in kinds:
            if self.over(rows=rows):
                break
            together = self._try(arrays)
            if isinstance(together, Exception):
                self.error = self.error or together
                taken += rows and self._alone(arrays)
                continue
            taken += 1
            if rows:
                self.refuted = self._refuted(arrays, together)
        self.sizes += bool(taken)

    def _try(self, arrays: Arrays) -> list[Any] | Exception:
        """Run once, with copies of the arrays, because the model may write into them."""
        try:
            found = self._run({name: np.array(array) for name, array in arrays.items()})
        except (ModelRejected, OutputMisfit, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - the runtime's errors share no base; made-up values may not be the model's
            return error
        if self.outputs is None:
            self.outputs = found
            self._ran(found)
        return found

    def _alone(self, arrays: Arrays) -> bool:
        """Run each row alone; if all succeed but the joined run fails, the model takes one row at a time."""
        found = [self._try(_row(arrays, row)) for row in range(_count(arrays))]
        ran = [outputs for outputs in found if not isinstance(outputs, Exception)]
        if len(ran) == len(found):
            self.refuted = f"it runs with each of {len(found)} rows alone, but not with all of them"
        return bool(ran)

    def _refuted(self, arrays: Arrays, together: list[Any]) -> str:
        count = _count(arrays)
        for name, output in zip(self._names, together, strict=True):
            if not output.shape or output.shape[0] != count:
                return f"output '{name[:64]}' of {count} rows has the shape {list(output.shape)}"
        for row in range(count):
            if time.monotonic() > self._ends:
                break
            own = _row(arrays, row)
            alone = self._try(own)
            if isinstance(alone, Exception):
                return f"it runs with {count} rows, but not with one of them"
            for index, (single, many) in enumerate(zip(alone, together, strict=True)):
                why = _difference(single, many[row : row + 1])
                if why and not self._sensitive(own, index, single):
                    return f"output '{self._names[index][:64]}' of a row alone and among {count} rows {why}"
        return ""

    def _sensitive(self, arrays: Arrays, index: int, output: Any) -> bool:
        """Return whether rounding can explain a difference: inputs with changed last digits cause one too."""
        moved = {
            name: (array * (1 + ULP * np.resize([1, -1, 0], array.shape))).astype(array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in arrays.items()
        }
        again = self._try(moved)
        return isinstance(again, Exception) or bool(_difference(output, again[index]))


def words(error: Exception) -> str:
    """Return an error in one line, without anything that could be a path."""
    text = " ".join(word for word in str(error).split() if "/" not in word)[:240]
    return text if isinstance(error, TetherError) else f"{type(error).__name__}: {text}"


def _row(arrays: Arrays, row: int) -> dict[str, Any]:
    return {name: array[row : row + 1] for name, array in arrays.items()}


def _count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _difference(one: Any, other: Any) -> str:
    if one.shape != other.shape:
        return f"have the shapes {list(one.shape)} and {list(other.shape)}"
    if one.dtype.kind != "f" and one.dtype != BF16:
        return "" if np.array_equal(one, other) else "are different"
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "are not finite in the same places"
    scale = float(np.max(np.abs(a[finite]), initial=0.0))
    most = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    # A row of zeros alone must be zero among others too, except for rounding.
    limit = TOLERANCE * scale * (4 if one.dtype.itemsize < 4 else 1)
    return f"differ by {most:.2g}, where the largest number is {scale:.2g}" if most > limit else ""


def _rows(inputs: Sequence[TensorSpec], size: int, rows: int) -> Iterator[dict[str, Any]]:
    """Generate inputs of several kinds, from commonly to rarely accepted ones."""
    kinds = KINDS if any(spec.datatype == "BYTES" or _dtype(spec).kind in "iu" for spec in inputs) else 1
    for kind in range(kinds):
        draw = np.random.default_rng([size, kind])
        yield {spec.name: _array(spec, _shape(spec, rows, size), kind, draw) for spec in inputs}


def _dtype(spec: TensorSpec) -> Any:
    return np.dtype(np.object_) if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype]


def _shape(spec: TensorSpec, rows: int, size: int) -> list[int]:
    shape = [
        rows if place == 0 and axis == -1 else size if axis == -1 else axis for place, axis in enumerate(spec.shape)
    ]
    if np.prod(shape, dtype=np.float64) > MAX_ELEMENTS:
        raise ModelRejected(
            f"input '{spec.name[:64]}' has more than {MAX_ELEMENTS} elements in {rows} rows", field="file"
        )
    return shape


def _array(spec: TensorSpec, shape: list[int], kind: int, draw: np.random.Generator) -> Any:
    if spec.datatype == "BYTES":
        return _texts(shape, kind, draw)
    dtype = NUMPY_DTYPES[spec.datatype]
    if dtype.kind == "b":
        return draw.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return _whole(shape, kind, dtype, draw)
    rows = shape[0] if shape else 1
    scales = np.resize(SCALES, rows).reshape(-1, *[1] * (len(shape) - 1)) if shape else 1.0
    most = float(np.finfo(np.float16).max) if dtype.itemsize == 2 and dtype != BF16 else 1e9
    return np.asarray(np.clip(draw.standard_normal(shape) * scales, -most, most)).astype(dtype)


def _whole(shape: list[int], kind: int, dtype: Any, draw: np.random.Generator) -> Any:
    """Ones, 1 to 3, 1 to 100, all positive ones, and both signs.

    Never 0 or the minimum: ONNX Runtime divides by the one, and the other by -1, which kills its process.
    """
    most = int(np.iinfo(dtype).max)
    largest = (1, 3, min(100, most), most, most)[kind]
    found = np.asarray(draw.integers(1, largest, shape, dtype, endpoint=True))
    if kind == 4 and dtype.kind == "i":
        return np.where(draw.integers(0, 2, shape).astype(bool), found, -found).astype(dtype)
    return found


def _texts(shape: list[int], kind: int, draw: np.random.Generator) -> Any:
    """Words, sentences, numbers, other scripts, and texts of very different lengths; as bytes, like in serving."""
    choices = (
        ["a", "word", "Ulm"],
        ["a short sentence", "another, of more words than the first one"],
        ["1", "-2.5", "1e6"],
        ["Größe", "Привет", "日本語", "🙂"],
        ["x", "long " * 40, " "],
    )[kind]
    return draw.choice(np.array([text.encode() for text in choices], np.object_), shape)
