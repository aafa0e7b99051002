"""The process of one model: ``python -m tether.worker.runtimes.child_process``, started by :mod:`tether.worker.runtimes.process_runtime`.

It is confined before anything else (:mod:`tether.sandbox.enter`) and limits its memory. Then it imports the framework, which
takes seconds, and waits until it is told where the files are.
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
"""Classes of errors for want of memory: Python's, PyTorch's, TensorFlow's."""
_SCARCE_WORDS = ("bad_alloc", "bad allocation", "can't allocate memory", "allocate memory for", "CUDA out of memory")
"""What ONNX Runtime and PyTorch say in errors that have no class of their own for it."""


def main() -> int:
    questions, answers = os.dup(0), os.dup(1)
    tempfile.tempdir = os.environ["TMPDIR"]  # frameworks ask for one, and do not always write there
    # a model's code may print, and must not read what it is asked
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        start = codec.decode(read_frame(questions, math.inf), Start)
        _limit(start.options)
        load = _prepared(start)
        directory = str(codec.unpack(read_frame(questions, math.inf)))
    except EOFError:  # nobody wants it any more
        return 0
    try:
        os.chdir(directory)
        runtime = load(Path(directory), start.options)
    except Exception as error:  # noqa: BLE001 - a model's code may raise whatever it likes
        write_frame(answers, codec.pack(_refusal(error, "", start.options)), math.inf)
        return 1
    write_frame(answers, codec.pack((True, ())), math.inf)
    return _serve(runtime, start, questions, answers)


def _prepared(start: Start) -> runtimes.Load:
    """What fails here is told when the files are there: before that nobody listens."""
    try:
        return runtimes.prepare_here(start.manifest)
    except Exception as error:  # noqa: BLE001 - and so may a package that is imported
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
        arrays = {row[0]: np.array(to_numpy(Tensor(*row))) for row in rows}  # the model's own, to write into
        found = runtime.run(arrays, outputs)
        names = outputs or runtime.output_names
        tensors = [from_numpy(name, array) for name, array in zip(names, found, strict=True)]
        return True, [(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in tensors]
    except Exception as error:  # noqa: BLE001 - likewise
        return _refusal(error, "the model failed: ", options)


def _refusal(error: Exception, what: str, options: Options) -> Answer:
    if _is_scarcity(error):
        limit = f"it may have {options.memory_mb} MiB" if options.memory_mb else "the machine has no more"
        return None, f"{limit}; {type(error).__name__}: {_one_line(error)}"
    if isinstance(error, TetherError):
        return False, error.message
    return False, f"{what}{type(error).__name__}: {_one_line(error)}"


def _is_scarcity(error: BaseException | None) -> bool:
    """Whether it is for want of memory, or was raised from what is."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & set(_SCARCE) or any(words in str(error) for words in _SCARCE_WORDS):
            return True
        error = error.__cause__
    return False


def _one_line(error: Exception) -> str:
    """The error's own words, without line breaks and without what could be a path."""
    return " ".join(word for word in str(error).split() if "/" not in word)[:300]


def _packed(answer: Answer, options: Options) -> tuple[bool | None, bytes]:
    """The first part of an answer and its bytes; it is a refusal where the bytes are too many, or there is no memory for them."""
    try:
        content = codec.pack(answer)
    except MemoryError as error:
        answer = _refusal(error, "", options)
        content = codec.pack(answer)
    if len(content) > LARGEST_FRAME:
        answer = (False, f"the outputs of one run have {len(content)} bytes; at most {LARGEST_FRAME} fit")
        content = codec.pack(answer)
    return answer[0], content


if __name__ == "__main__":
    sys.exit(main())
