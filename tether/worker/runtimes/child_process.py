"""Main program of a model's process, started by :mod:`tether.worker.runtimes.process_runtime`.

It confines itself first (:mod:`tether.sandbox.enter`) and limits its memory. Then it imports the framework,
which takes seconds, and waits for the path of the files.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from tether.domain.tensor import Tensor, from_numpy, to_numpy
from tether.errors import TetherError
from tether.frameworks.runtime import Runtime
from tether.wire import codec
from tether.worker import runtimes
from tether.worker.runtimes.frames import LARGEST_FRAME, read_frame, write_frame
from tether.worker.runtimes.process_runtime import Options, Start

Answer = tuple[bool | None, object]

_SCARCE = ("MemoryError", "OutOfMemoryError", "ResourceExhaustedError")
"""Error classes for lack of memory in Python, PyTorch and TensorFlow."""
_SCARCE_WORDS = ("bad_alloc", "bad allocation", "can't allocate memory", "allocate memory for", "CUDA out of memory")
"""Phrases in out-of-memory errors of ONNX Runtime and PyTorch that have no class of their own."""


def main() -> int:
    questions, answers = os.dup(0), os.dup(1)
    tempfile.tempdir = os.environ["TMPDIR"]  # frameworks need a temporary folder, and do not always write there
    # a model's code may print, and must not read the requests
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        start = codec.decode(read_frame(questions, math.inf), Start)
        _limit(start.options)
        load = _prepared(start)
        directory = str(codec.unpack(read_frame(questions, math.inf)))
    except EOFError:  # the worker has closed the pipe
        return 0
    try:
        os.chdir(directory)
        runtime = load(Path(directory), start.options)
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        write_frame(answers, codec.pack(_refusal(error, "", start.options)), math.inf)
        return 1
    write_frame(answers, codec.pack((True, ())), math.inf)
    return _serve(runtime, start, questions, answers)


def _prepared(start: Start) -> runtimes.Load:
    """Import the framework; report a failure only after the files are there, when the worker reads."""
    try:
        return runtimes.prepare_here(start.manifest)
    except Exception as error:  # noqa: BLE001 - and so may a package on import
        failed = error

    def fail(_directory: Path, _options: Options) -> Runtime:
        raise failed

    return fail


def _serve(runtime: Runtime, start: Start, questions: int, answers: int) -> int:
    while True:
        try:
            question = read_frame(questions, math.inf)
        except EOFError:
            return 0
        except MemoryError as error:
            answer = _refusal(error, "", start.options)
        else:
            answer = _run(runtime, question, start.options)
        good, content = _packed(answer, start.options)
        write_frame(answers, content, math.inf)
        if good is None:
            return 1


def _limit(options: Options) -> None:
    if options.memory_mb:
        size = options.memory_mb << 20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _run(runtime: Runtime, question: bytes, options: Options) -> Answer:
    try:
        outputs, rows = codec.unpack(question)
        arrays = {row[0]: np.array(to_numpy(Tensor(*row))) for row in rows}  # the model's own writable folder
        found = runtime.run(arrays, outputs)
        names = outputs or runtime.output_names
        tensors = [from_numpy(name, array) for name, array in zip(names, found, strict=True)]
        return True, [(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in tensors]
    except Exception as error:  # noqa: BLE001 - likewise
        return _refusal(error, "the model failed: ", options)


def _refusal(error: Exception, what: str, options: Options) -> Answer:
    if _is_scarcity(error):
        limit = f"its limit is {options.memory_mb} MiB" if options.memory_mb else "the machine has no more"
        return None, f"{limit}; {type(error).__name__}: {_one_line(error)}"
    if isinstance(error, TetherError):
        return False, error.message
    return False, f"{what}{type(error).__name__}: {_one_line(error)}"


def _is_scarcity(error: BaseException | None) -> bool:
    """Return True if the error, or one of its causes, is a lack of memory."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & set(_SCARCE) or any(words in str(error) for words in _SCARCE_WORDS):
            return True
        error = error.__cause__
    return False


def _one_line(error: Exception) -> str:
    """Return the error's message in one line, without words that could be paths."""
    return " ".join(word for word in str(error).split() if "/" not in word)[:300]


def _packed(answer: Answer, options: Options) -> tuple[bool | None, bytes]:
    """Return status and bytes of a response; a failure if outputs exceed a frame or memory."""
    try:
        content = codec.pack(answer)
    except MemoryError as error:
        answer = _refusal(error, "", options)
        content = codec.pack(answer)
    if len(content) > LARGEST_FRAME:
        answer = (False, f"the outputs of one run have {len(content)} bytes; the limit is {LARGEST_FRAME}")
        content = codec.pack(answer)
    return answer[0], content


if __name__ == "__main__":
    sys.exit(main())
