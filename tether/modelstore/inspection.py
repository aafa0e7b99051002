"""Look at a pushed model in a process of its own, and say what it is or why it cannot be served."""

from __future__ import annotations

import asyncio
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

import msgspec

from tether.errors import FormatNotAllowed, ModelLimits, ModelRejected, UnsafeModel
from tether.model import TensorSpec
from tether.processes import die_with_parent
from tether.sandbox import plan

MAX_REPORT = 1 << 20
"""Bytes of the child's answer; a model whose signature is longer is refused."""

REFUSALS = {kind.code: kind for kind in (ModelRejected, FormatNotAllowed, UnsafeModel, ModelLimits)}
"""The errors that a child may report."""

_MB = 1 << 20
CONFINED = plan.Wish()


class Inspection(msgspec.Struct, frozen=True):
    """What a model is. ``max_batch_size`` is the rows one run may have, 0 when its first axis is no batch axis.

    ``note`` says in one line why a model is not batched, or that it was not tried; often empty when it is batched, and
    when nothing is known of its rows.
    ``refuted``: a trial run showed that rows depend on one another, so nobody may declare that they do not.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    note: str = ""
    refuted: bool = False


class Limits(msgspec.Struct, frozen=True):
    """What an inspection may cost: MiB of address space, seconds of processor time, seconds of real time."""

    memory_mb: int = 4096
    cpu_s: int = 60
    wall_s: float = 90.0

    @classmethod
    def for_size(cls, size: int, memory_mb: int = 4096) -> Limits:
        """Limits for files of ``size`` bytes: parsing and optimising hold a few copies of the weights.

        ``memory_mb`` is what the framework itself takes.
        """
        gigabytes = size / (1 << 30)
        return cls(
            memory_mb=memory_mb + 5 * size // _MB,
            cpu_s=int(60 + 120 * gigabytes),
            wall_s=min(240.0, 90.0 + 180.0 * gigabytes),
        )


class Report(msgspec.Struct, frozen=True):
    """The child's one line: an inspection, or the reason for a refusal."""

    inspection: Inspection | None = None
    rejected: str = ""
    field: str = "file"
    code: str = ModelRejected.code


async def inspect(
    directory: Path, inspector: str, limits: Limits, platform: str = "", confined: plan.Wish = CONFINED
) -> Inspection:
    """Inspect the files of ``directory`` with a module of this package, which is told the platform. The child is ``confined``,
    inherits no environment, may write no file, and reads nothing but these files and libraries.

    Raises:
        ModelRejected: the model cannot be served, or its inspection crashed, ran too long or needed too much memory.
    """
    wish = msgspec.structs.replace(confined, read=(str(directory), *confined.read))
    arguments = (str(directory), str(limits.memory_mb), str(limits.cpu_s), platform)
    process = await asyncio.create_subprocess_exec(
        *plan.command(plan.plan(wish), f"tether.modelstore.{inspector}", *arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        cwd=directory,
        env=_environment(),
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        async with asyncio.timeout(limits.wall_s):
            answer = await _read(process)
            status = await process.wait()
    except TimeoutError as error:
        raise _too_long(limits.wall_s) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _judge(answer, status, limits)


def _environment() -> dict[str, str]:
    return {
        **plan.environment(),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


async def _read(process: Process) -> bytes:
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    found = bytearray()
    while part := await process.stdout.read(65536):
        found += part
        if len(found) > MAX_REPORT:
            raise ModelRejected(
                "the model's description is longer than 1 MiB; it has too many inputs or outputs", field="file"
            )
    return bytes(found)


def _judge(answer: bytes, status: int, limits: Limits) -> Inspection:
    if status == -24:  # SIGXCPU
        raise _too_long(limits.cpu_s)
    try:
        report = msgspec.json.decode(answer, type=Report)
    except msgspec.DecodeError as error:
        raise ModelLimits(
            f"loading the model ended its process ({_ending(status)}), within {limits.memory_mb} MiB; "
            "run it on your machine and export it again",
            field="file",
        ) from error
    if report.inspection is None:
        raise REFUSALS.get(report.code, ModelRejected)(report.rejected, field=report.field)
    return report.inspection


def _too_long(seconds: float) -> ModelLimits:
    return ModelLimits(
        f"loading and one warm-up run took longer than {seconds:g} s; push a smaller model", field="file"
    )


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
