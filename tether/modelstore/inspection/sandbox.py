"""Main program of every inspecting child: limit itself, inspect, print reports, one per line.

Called as ``tether.modelstore.inspect_X DIR MEMORY_MB CPU_SECONDS PLATFORM SIGNATURE`` in a process that is
already confined (:mod:`tether.sandbox.enter`). It limits its memory and processor time, and writes files only
to the folder in memory that it may have been given.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import msgspec

from tether.errors import InspectionLimitExceeded, ModelRejected
from tether.modelstore.inspection.inspector import Inspection, InspectionReport, Tell

_MEMORY_WORDS = ("bad_alloc", "bad allocation", "allocate memory")
MEMORY = "the model needs more memory than an inspection may use; push a smaller model"


Inspect = Callable[[Path, Tell], Inspection]


def main(arguments: list[str], inspect: Inspect, *, files: int = 64) -> int:
    """Inspect the folder in the arguments; ``files`` may be open at a time."""
    directory, memory_mb, cpu_s = arguments[:3]
    _limit(int(memory_mb), int(cpu_s), files)
    # Libraries write to descriptor 1; the report goes to a duplicate that they do not know.
    report_to = os.dup(1)
    os.dup2(2, 1)

    def tell(report: InspectionReport) -> None:
        line = msgspec.json.encode(report) + b"\n"
        while line:
            line = line[os.write(report_to, line) :]

    tell(_report(Path(directory), inspect, tell))
    return 0


def _limit(memory_mb: int, cpu_s: int, files: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    if "TMPDIR" not in os.environ:  # set with the folder in memory, whose size then limits files
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def _report(directory: Path, inspect: Inspect, tell: Tell) -> InspectionReport:
    try:
        return InspectionReport(inspection=inspect(directory, tell))
    except ModelRejected as error:
        return InspectionReport(rejected=error.message, field=error.field or "file", code=error.code)
    except MemoryError:
        return InspectionReport(rejected=MEMORY, code=InspectionLimitExceeded.code)
    except Exception as error:  # noqa: BLE001 - a model's code, and every framework, raises what it likes
        return InspectionReport(rejected=refused("it cannot be loaded", error).message)


def is_memory(error: Exception) -> bool:
    """Return whether a framework's error means that memory ran out."""
    return any(words in str(error) for words in _MEMORY_WORDS)


def refused(what: str, error: Exception) -> ModelRejected:
    """Return a refusal in one line, without anything that could be a path."""
    text = " ".join(word for word in str(error).split() if "/" not in word)[:240]
    return ModelRejected(f"the model was refused: {what}: {type(error).__name__}: {text}", field="file")
