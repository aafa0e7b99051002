"""The process of one model: ``python -m tether.worker.runtimes.child``, started by :mod:`tether.worker.runtimes.process`.

It limits itself before it touches the model: memory, no core dumps, few files, no network where the kernel lets it.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

from tether import codec
from tether.errors import TetherError
from tether.ports import Runtime
from tether.processes import leave_network
from tether.tensor import Tensor, from_numpy, to_numpy
from tether.worker import runtimes
from tether.worker.runtimes.process import Options, Start, read_frame, write_frame


def main() -> int:
    questions, answers = os.dup(0), os.dup(1)
    # a model's code may print, and must not read what it is asked
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    start = codec.decode(read_frame(questions, math.inf), Start)
    _limit(start.options)
    try:
        runtime = runtimes.load_here(start.manifest, Path(start.directory), start.options)
    except TetherError as error:
        _answer(answers, (False, error.message))
        return 1
    except MemoryError:
        _answer(answers, (False, f"it needs more than {start.options.memory_mb} MiB"))
        return 1
    except Exception as error:  # noqa: BLE001 - a model's code may raise whatever it likes
        _answer(answers, (False, f"{type(error).__name__}: {_one_line(error)}"))
        return 1
    _answer(answers, (True, ()))
    while True:
        try:
            question = read_frame(questions, math.inf)
        except EOFError:
            return 0
        _answer(answers, _run(runtime, question))


def _limit(options: Options) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if options.memory_mb:
        size = options.memory_mb << 20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    leave_network()


def _run(runtime: Runtime, question: bytes) -> tuple[bool, object]:
    try:
        outputs, rows = codec.unpack(question)
        arrays = {row[0]: to_numpy(Tensor(*row)) for row in rows}
        found = runtime.run(arrays, outputs)
        names = outputs or runtime.output_names
        tensors = [from_numpy(name, array) for name, array in zip(names, found, strict=True)]
        return True, [(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in tensors]
    except TetherError as error:
        return False, error.message
    except MemoryError:
        return False, "the model ran out of memory"
    except Exception as error:  # noqa: BLE001 - likewise
        return False, f"the model failed: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """The error's own words, without line breaks and without what could be a path."""
    return " ".join(word for word in str(error).split() if "/" not in word)[:300]


def _answer(descriptor: int, answer: tuple[bool, object]) -> None:
    write_frame(descriptor, codec.pack(answer), math.inf)


if __name__ == "__main__":
    sys.exit(main())
