"""Inspects a pushed model in a separate process and returns its description or the reason for a refusal."""

from __future__ import annotations

import asyncio
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from tether.domain.manifest import TensorSpec
from tether.errors import FormatNotAllowed, InspectionLimitExceeded, ModelRejected, UnsafeModel
from tether.process.os_process import die_with_parent
from tether.sandbox import plan

MAX_REPORT = 1 << 20
"""Maximum bytes of the child's report; a model with a longer signature is refused."""

REFUSALS = {kind.code: kind for kind in (ModelRejected, FormatNotAllowed, UnsafeModel, InspectionLimitExceeded)}
"""Errors that a child may report."""

LOADING = "loading the model"
IMPORTING = "importing model.py"
MAKING = "making the class of model.py and its load()"
TRYING = "the trial run with made-up inputs"
SAMPLE = "the trial run with the sample"
MORE = "further trial runs"
"""Steps that a child may report."""

_HINTS = {
    IMPORTING: "something at the top level of model.py, or of a module that it imports, does not finish",
    MAKING: "it waits forever, or loads too much",
    TRYING: "push a smaller model, or real inputs with --sample",
}
_FAULTS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGBUS)
"""Signals that the computation of a model can raise in its process."""
_MB = 1 << 20
CONFINED = plan.ConfinementRequest()


class Inspection(msgspec.Struct, frozen=True):
    """Description of a model. ``max_batch_size``: maximum rows per run, 0 if its first axis is not a batch axis.

    ``note``: in one line, why a model is not batched or was not tried; often empty if it is batched, and if
    nothing is known of its rows.
    ``refuted``: a trial run showed that rows depend on one another, so a declaration of independence is
    refused.
    ``untried``: in one line, why no trial run succeeded; empty if one did. ``crashed``: a trial run killed
    its process.
    ``signature``: the served one of the file's ``signatures``, for formats that have several.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    note: str = ""
    refuted: bool = False
    untried: str = ""
    crashed: bool = False
    signature: str = ""
    signatures: tuple[str, ...] = ()


class InspectionLimits(msgspec.Struct, frozen=True):
    """Limits of an inspection: MiB of address space, seconds of processor time, seconds of wall time."""

    memory_mb: int = 4096
    cpu_s: int = 60
    wall_s: float = 90.0

    @classmethod
    def for_size(cls, size: int, memory_mb: int = 4096) -> InspectionLimits:
        """Return limits for files of ``size`` bytes: parsing and optimising need several times the weights.

        ``memory_mb`` is the framework's own need.

        ``memory_mb`` is what the framework itself takes.
        """
        gigabytes = size / (1 << 30)
        return cls(
            memory_mb=memory_mb + 5 * size // _MB,
            cpu_s=int(60 + 120 * gigabytes),
            wall_s=min(240.0, 90.0 + 180.0 * gigabytes),
        )


class InspectionReport(msgspec.Struct, frozen=True):
    """One line of the child. With ``doing`` it announces the next step and what is known of the model so far;
    without, it is the last line: an inspection, or the reason for a refusal.
    """

    inspection: Inspection | None = None
    rejected: str = ""
    field: str = "file"
    code: str = ModelRejected.code
    doing: str = ""


Tell = Callable[[InspectionReport], None]
"""Sends a report line before the inspection is over."""


async def inspect(
    directory: Path,
    inspector: str,
    limits: InspectionLimits,
    wanted: tuple[str, str] = ("", ""),
    confined: plan.ConfinementRequest = CONFINED,
) -> Inspection:
    """Inspect the files of ``directory`` with a module of this package. ``wanted``: the platform and the signature.

    The child is ``confined``, inherits no environment, writes files only to its folder in memory, if any, and
    reads only these files and libraries.

    Raises:
        ModelRejected: the model cannot be served, or its inspection crashed, timed out or needed too much
    memory.
    """
    wish = msgspec.structs.replace(confined, read=(str(directory), *confined.read), behind=True)
    arguments = (str(directory), str(limits.memory_mb), str(limits.cpu_s), *wanted)
    process = await asyncio.create_subprocess_exec(
        *plan.command(plan.plan(wish), f"tether.modelstore.inspection.file_formats.{inspector}", *arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        cwd=directory,
        env=_environment(),
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    answer, late = bytearray(), False
    try:
        async with asyncio.timeout(limits.wall_s):
            await _read(process, answer)
            await process.wait()
    except TimeoutError:
        late = True
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _judge(_last(answer), 0 if late else process.returncode or 0, limits, limits.wall_s if late else 0.0)


def _environment() -> dict[str, str]:
    return {
        **plan.environment(),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


async def _read(process: Process, found: bytearray) -> None:
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    while part := await process.stdout.read(65536):
        found += part
        if len(found) > MAX_REPORT:
            raise ModelRejected(
                "the model's description is longer than 1 MiB; it has too many inputs or outputs", field="file"
            )


def _last(answer: bytes | bytearray) -> InspectionReport:
    """Return the last whole line that the child wrote."""
    for line in reversed(bytes(answer).split(b"\n")):
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=InspectionReport)
    return InspectionReport(doing=LOADING)


def _judge(last: InspectionReport, status: int, limits: InspectionLimits, late_s: float) -> Inspection:
    """Return the child's result, or judge its end: after ``late_s`` seconds (0: not late), or with a ``status``.

    A model that ran once is accepted whatever happened to further trial runs; one whose first run crashed
    counts as not tried.
    """
    if not last.doing and last.inspection is not None:
        return last.inspection
    if not last.doing:
        raise REFUSALS.get(last.code, ModelRejected)(last.rejected, field=last.field)
    late_s = late_s or (limits.cpu_s if status == -signal.SIGXCPU else 0.0)
    known, ending = (
        last.inspection,
        f"took longer than {late_s:g} s" if late_s else f"killed its process ({_ending(status)})",
    )
    if known is not None and not known.untried:
        note = f"{known.note}; " if known.note else ""
        return msgspec.structs.replace(known, note=f"{note}not all trial runs were made: one {ending}")
    if known is not None and -status in _FAULTS:
        return msgspec.structs.replace(known, untried=f"{last.doing} {ending}", crashed=True)
    if late_s:
        raise InspectionLimitExceeded(
            f"{last.doing} {ending}; {_HINTS.get(last.doing, 'push a smaller model')}", field="file"
        )
    raise InspectionLimitExceeded(
        f"{last.doing} {ending}, within {limits.memory_mb} MiB; run it on your machine and export it again",
        field="file",
    )


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
