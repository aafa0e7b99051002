"""Runs a model in its own process: a crash, a hang or a leak affects only that process.

Parent and child use a pair of pipes. A frame is a big-endian u32 length and msgpack; tensors are rows
``[name, datatype, shape, bytes]`` with bytes as in the Open Inference Protocol. The parent sends
:class:`Start`, and then the path of the files, which the child answers. Each request is ``[outputs,
tensors]``. The child answers ``[true, tensors]`` or ``[false, message]``, or ``[null, message]`` if it lacks
memory, after which it exits.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tether.domain.manifest import Manifest
from tether.domain.tensor import Array, Tensor, from_numpy, to_numpy
from tether.errors import BadEncoding, InferenceFailed, ModelRejected
from tether.model.config import Warmup
from tether.process import metrics
from tether.process.os_process import LONG_S, die_with_parent, lower_process_priority, out_of_memory_kills, processor_s
from tether.sandbox import plan
from tether.wire import codec
from tether.worker.runtimes import compiler_env, graph_cache
from tether.worker.runtimes.child_output import ModelOutputLog
from tether.worker.runtimes.frames import LARGEST_FRAME, read_frame, write_frame

log = logging.getLogger(__name__)

_OWN_DOING = ("memory", "signal", "exit")
_BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Seconds to wait before the n-th start in a row without a completed run."""


class Options(msgspec.Struct, frozen=True):
    """How a model is run.

    ``memory_mb`` limits its process's address space (0: unlimited), ``run_memory_mb`` the outputs of a run
    (0: the largest frame); times are in seconds.

    ``graph_cache`` is the folder of optimised graphs beside the version folders, limited to
    ``graph_cache_mb`` MiB. Empty: no cache; a version whose files lie elsewhere has none either. ``compile``:
    for any number of rows, and for ``warmup``.

    ``confinement`` is the setting ``model_confinement``. The process reads its own files, libraries and
    ``read_dirs``, nothing below the data directory ``home``. It may write ``scratch_mb`` MiB of its own
    files.
    """

    threads: int = 1
    memory_mb: int = 0
    run_memory_mb: int = 0
    run_timeout_s: float = 60.0
    load_timeout_s: float = 300.0
    device: str = "auto"
    graph_cache: str = ""
    graph_cache_mb: int = 0
    compile: bool = False
    warmup: tuple[Warmup, ...] = ()
    confinement: str = plan.REQUIRED
    home: str = ""
    read_dirs: tuple[str, ...] = ()
    scratch_mb: int = 64
    behind: bool = False
    """Whether its process has low priority from the start, and not only after its first long run."""


class Start(msgspec.Struct, frozen=True):
    """First message to a child: enough to limit itself and to import its framework."""

    manifest: Manifest
    options: Options


class ProcessEnd(NamedTuple):
    """How a child ended, as text and as a metric label."""

    words: str
    reason: str


class ProcessRuntime:
    """A runtime in another process; see :class:`tether.frameworks.runtime.Runtime`.

    The constructor starts the process, which imports the framework and waits for :meth:`load`. A run after a
    crash restarts it, with backoff. Setting ``closed`` aborts every wait, the constructor's included.
    """

    def __init__(
        self, manifest: Manifest, directory: Path, options: Options, closed: threading.Event | None = None
    ) -> None:
        self._directory = str(directory)
        self._graphs = graph_cache.of_process(manifest.platform, directory, options.graph_cache)
        self._start = Start(manifest, msgspec.structs.replace(options, graph_cache=self._graphs))
        self._options = options
        self.run_timeout_s = options.run_timeout_s
        """Timeout of later runs in seconds."""
        self._outputs = tuple(spec.name for spec in manifest.outputs)
        self._child: subprocess.Popen[bytes] | None = None
        self._output_log: ModelOutputLog | None = None
        self._loading = ExitStack()
        """Resources that the process needs until it has loaded."""
        self.crash = ""
        """How the model last crashed its process; empty if it was killed or timed out."""
        self._failures = 0
        self._kills = 0
        self._behind = options.behind
        self._closed = closed or threading.Event()
        self._spawn()

    @property
    def output_names(self) -> Sequence[str]:
        return self._outputs

    @property
    def pid(self) -> int:
        """Return the id of the model's process; 0 if there is none."""
        return 0 if self._child is None else self._child.pid

    def load(self) -> ProcessRuntime:
        """Load the files, which must be complete and verified.

        Raises:
            ModelRejected: the framework refuses them, or the process ended, now or while it waited.
        """
        with self._loading, self._rejecting():
            self._ask(codec.pack(self._directory), self._options.load_timeout_s)
        if self._graphs:
            graph_cache.trim(self._graphs, self._options.graph_cache_mb << 20)
        return self

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once and return ``outputs``; an empty list returns all in the model's order.

        Raises:
            InferenceFailed: the model refused its input, crashed, or took longer than ``run_timeout_s``;
                or inputs or outputs are larger than a frame.
        """
        if self._child is None:
            self._restart()
        rows = [_row(from_numpy(name, array)) for name, array in inputs.items()]
        question = codec.pack((list(outputs), rows))
        if len(question) > LARGEST_FRAME:
            raise InferenceFailed(f"the inputs of one run have {len(question)} bytes; the limit is {LARGEST_FRAME}")
        before = processor_s(self.pid)
        answer = self._ask(question, self.run_timeout_s, partial(self._check_priority, before))
        self._check_priority(before)
        self._failures = 0
        found = {row[0]: row for row in answer}
        try:
            return [to_numpy(Tensor(*found[name])) for name in outputs or self._outputs]
        except KeyError as error:
            raise InferenceFailed(f"the model's process did not return output {error}") from error

    def end(self) -> None:
        """Do nothing: loads and runs have timeouts."""

    def close(self) -> None:
        self._closed.set()
        self._end()

    @property
    def pause_s(self) -> float:
        """Return seconds before the next start of the process; more with each start without a completed run."""
        return _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]

    def _restart(self) -> None:
        if self._closed.wait(self.pause_s):
            raise InferenceFailed("the model is being unloaded")
        metrics.MODEL_RESTARTS.labels(self._start.manifest.name).inc()
        try:
            self._spawn()
            self.load()
        except ModelRejected as error:
            raise InferenceFailed(f"could not restart the model's process: {error.message}") from error

    def _spawn(self) -> None:
        more: Mapping[str, str] = {}
        if self._options.compile:
            sealed = self._start.manifest.sealed is not None
            made = compiler_env.made(Path(self._directory), self._graphs, sealed=sealed)
            more = self._loading.enter_context(made)
        self._failures += 1
        self._kills = out_of_memory_kills()
        self._child = subprocess.Popen(
            plan.command(plan.plan(self._confinement_request(more)), "tether.worker.runtimes.child_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",  # away from files that are not verified yet
            env={**_environment(self._options.threads, self._directory), **more},
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - it imports and locks nothing
        )
        if self._behind:
            lower_process_priority(self._child.pid)
        manifest = self._start.manifest
        assert isinstance(self._child.stderr, BufferedReader)  # noqa: S101 - PIPE was requested
        self._output_log = ModelOutputLog(self._child.stderr, manifest.name, manifest.version)
        with self._rejecting(), self._speaking(self._options.load_timeout_s) as (questions, _, end):
            write_frame(questions, codec.encode(self._start), end, self._closed)

    def _confinement_request(self, more: Mapping[str, str]) -> plan.ConfinementRequest:
        options = self._options
        write = [more[compiler_env.FOLDER]] if more else []
        if self._graphs:
            write.append(self._graphs)
        return plan.ConfinementRequest(
            mode=plan.mode_for(options.confinement, self._start.manifest.platform),
            apart=options.home,
            read=(self._directory, *options.read_dirs),
            write=tuple(write),
            compilers=tuple(compiler_env.PATH.split(os.pathsep)) if more else (),
            gpu=options.device != "cpu",
            scratch_mb=options.scratch_mb,
            file_mb=max(options.scratch_mb, options.graph_cache_mb, 1) if write else options.scratch_mb,
            dies_first=True,
        )

    @contextmanager
    def _rejecting(self) -> Iterator[None]:
        try:
            yield
        except InferenceFailed as error:
            self._end()
            raise ModelRejected(f"cannot load the model: {error.message}") from error

    def _check_priority(self, before: float) -> None:
        """Lower the process's priority for good after a long run."""
        if not self._behind and processor_s(self.pid) - before >= LONG_S:
            self._behind = True
            lower_process_priority(self.pid)

    def _ask(self, question: bytes, timeout_s: float, look: Callable[[], None] | None = None) -> list[Any]:
        with self._speaking(timeout_s) as (questions, answers, end):
            write_frame(questions, question, end, self._closed)
            good, content = codec.unpack(read_frame(answers, end, self._closed, look))
        if good is None:
            raise self._broken(ProcessEnd(f"ran out of memory and was ended: {str(content)[:300]}", "memory"))
        if not good:
            raise InferenceFailed(str(content)[:500])
        return list(content)

    @contextmanager
    def _speaking(self, timeout_s: float) -> Iterator[tuple[int, int, float]]:
        """Yield the two pipes and the monotonic time limit; any failure in the block ends the process."""
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise InferenceFailed("the model's process is gone")
        try:
            yield child.stdin.fileno(), child.stdout.fileno(), time.monotonic() + timeout_s
        except TimeoutError as error:
            raise self._broken(ProcessEnd(f"took longer than {timeout_s:g} s and was ended", "timeout")) from error
        except (OSError, EOFError, BadEncoding, ValueError, TypeError) as error:
            if self._closed.is_set():
                self._end()
                raise InferenceFailed("the model is being unloaded") from error
            raise self._broken(self._how_it_ended(child)) from error

    def _how_it_ended(self, child: subprocess.Popen[bytes]) -> ProcessEnd:
        try:
            status = child.wait(2)
        except subprocess.TimeoutExpired:
            return ProcessEnd("sent an invalid response", "protocol")
        if status == -signal.SIGKILL and out_of_memory_kills() > self._kills:
            return ProcessEnd("was ended by signal 9 (SIGKILL), and the machine was out of memory", "memory")
        if status == -signal.SIGKILL:
            return ProcessEnd("was ended by signal 9 (SIGKILL)", "killed")
        if status < 0:
            return ProcessEnd(f"was ended by signal {-status} ({signal.Signals(-status).name})", "signal")
        return ProcessEnd(f"ended with status {status}", "exit")

    def _broken(self, ended: ProcessEnd) -> InferenceFailed:
        name = self._start.manifest.name
        if ended.reason in _OWN_DOING:
            self.crash = ended.words
        metrics.MODEL_CRASHES.labels(name, ended.reason).inc()
        fields = {"action": "model_process_ended", "model": name, "version": self._start.manifest.version}
        log.error("the model's process %s", ended.words, extra=fields)
        self._end()
        return InferenceFailed(f"the model's process {ended.words}")

    def _end(self) -> None:
        child, self._child = self._child, None
        self._loading.close()
        if child is None:
            return
        if child.returncode is None:  # not reaped yet, so the process id is not reused
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        if self._output_log is not None:
            self._output_log.close()


def _row(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.name, tensor.datatype, tensor.shape, tensor.data)


def _environment(threads: int, directory: str) -> dict[str, str]:
    """Return an environment without settings and keys; temporary files of encrypted models are in memory."""
    return {
        **plan.environment(),
        "TMPDIR": directory,  # only without a folder in memory for temporary files, which is preferred
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
