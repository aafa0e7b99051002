"""Decodes and encodes large JSON bodies in a separate process, so that they do not block the event loop.

A body of 4 MB takes some hundred milliseconds of CPU. In the event loop it would delay all requests, and a
tenant that sends one after the other would block all others. The process handles one body at a time; tenants
take turns by bytes. After a crash the next body restarts it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Datatype, Tensor
from tether.errors import TetherError, by_code
from tether.gateway_http.bodies import large_body_process as work
from tether.gateway_http.bodies import simple_bodies
from tether.gateway_http.bodies.job_bodies import SubmittedJob, read_jobs
from tether.gateway_http.bodies.large_body_process import LENGTH, rows_of, tensors_of
from tether.gateway_http.bodies.large_documents import decoded, read_document
from tether.gateway_http.fair_queue import FairQueue
from tether.process.os_process import die_with_parent
from tether.sandbox import plan
from tether.wire import codec, oip

log = logging.getLogger(__name__)

LARGE = 64 << 10
"""Size from which a body is large (bytes of JSON, or elements to encode as JSON): two milliseconds of work."""

_LONGEST_S = 60.0
"""Seconds after which the process is killed."""

_FAILED = codec.pack((False, TetherError.code, "internal error of the gateway; see its log", ""))

_Work = tuple[bytes, "asyncio.Future[bytes]"]


class LargeBodies:
    """The body process of one gateway. ``weight`` is a tenant's share; ``home`` is the data directory to hide
    from it."""

    def __init__(self, home: str, weight: Callable[[str], float]) -> None:
        self._home = home
        self._waiting: FairQueue[_Work] = FairQueue(weight)
        self._running: asyncio.Task[None] | None = None
        self._process: Process | None = None

    async def infer_request(
        self, tenant: str, body: bytes, json_length: int | None, specs: Mapping[str, TensorSpec]
    ) -> oip.InferRequest:
        """Decode an infer request; see :func:`oip.parse_infer_request`."""
        if (len(body) if json_length is None else json_length) < LARGE:
            return oip.parse_infer_request(body, json_length, specs=specs)
        name, rows, outputs, default, parameters = await self._do(
            tenant, len(body), work.infer_request, body, json_length
        )
        wanted = tuple([oip.RequestedOutput(*row) for row in outputs])
        return oip.InferRequest(name, tensors_of(rows), wanted, default, parameters)

    async def infer_answer(
        self, tenant: str, model: str, version: int, request: oip.InferRequest, tensors: Sequence[Tensor]
    ) -> tuple[bytes, int | None]:
        """Encode an infer response; see :func:`oip.build_infer_response`."""
        wanted = {output.name: output.binary and not output.classification for output in request.outputs}
        as_json = [tensor for tensor in tensors if not wanted.get(tensor.name, request.binary_default)]
        if not _large(as_json):
            return oip.build_infer_response(model=model, version=version, request=request, outputs=tensors)
        outputs = [(output.name, output.binary, output.classification) for output in request.outputs]
        asked = request.id, outputs, request.binary_default
        size = _bytes(tensors)
        found = await self._do(tenant, size, work.infer_answer, model, str(version), asked, rows_of(tensors))
        return bytes(found[0]), found[1]

    async def jobs(self, tenant: str, body: bytes, *, many: bool) -> list[SubmittedJob]:
        """Decode submitted jobs; see :func:`read_jobs`."""
        if len(body) < LARGE:
            return read_jobs(body, many=many)
        rows = await self._do(tenant, len(body), work.jobs, body, many)
        return [SubmittedJob(model, version, tensors_of(found), *rest) for model, version, found, *rest in rows]

    async def job_outputs(self, tenant: str, tensors: Sequence[Tensor]) -> bytes | None:
        """Encode the outputs of a job as JSON; return None if they are not large."""
        if not _large(tensors):
            return None
        return bytes(await self._do(tenant, _bytes(tensors), work.job_outputs, rows_of(tensors)))

    async def simple_inputs(
        self, tenant: str, data: bytes, model: str, specs: Mapping[str, TensorSpec]
    ) -> tuple[Tensor, ...]:
        """Decode simple inputs; see :func:`simple_bodies.read_input`."""
        if len(data) < LARGE:
            return simple_bodies.read_input(data, model, specs)
        known = [(spec.name, spec.datatype, spec.shape) for spec in specs.values()]
        return tensors_of(await self._do(tenant, len(data), work.simple_inputs, data, model, known))

    async def simple_answer(self, tenant: str, model: str, version: int, outputs: Sequence[Tensor]) -> bytes:
        """Encode a simple response; see :func:`simple_bodies.written`."""
        if not _large(outputs):
            return simple_bodies.written(model, version, outputs)
        rows = rows_of(outputs)
        return bytes(await self._do(tenant, _bytes(outputs), work.simple_answer, model, version, rows))

    async def document(self, tenant: str, kind: str, body: bytes) -> Any:
        """Decode a document; see :func:`read_document`. The process validates it; decoding it again here is
        fast."""
        if len(body) < LARGE:
            return read_document(kind, body)
        await self._do(tenant, len(body), work.document, kind, body)
        return decoded(kind, body)

    async def close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await self._end()

    async def _do(self, tenant: str, size: int, task: Callable[..., Any], *arguments: Any) -> Any:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.add(tenant, (codec.pack((task.__name__, *arguments)), future), size)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(), name="large-bodies")
        done, *told = codec.unpack(await future)
        if done:
            return told[0]
        raise _error(*told)

    async def _run(self) -> None:
        while taken := self._waiting.take(1, 0, lambda work: not work[1].done()):
            for question, future in taken:
                answer = await self._answered(question) or await self._answered(question) or _FAILED
                if not future.done():
                    future.set_result(answer)

    async def _answered(self, question: bytes) -> bytes:
        """Return an empty reply if the process ended. Another body may have caused it, so the caller tries
        twice."""
        try:
            async with asyncio.timeout(_LONGEST_S):
                return await self._asked(question)
        except (OSError, EOFError, TimeoutError, TetherError) as error:
            log.warning(
                "the process for large bodies failed and was stopped: %r", error, extra={"action": "large_bodies_ended"}
            )
            await self._end()
            return b""

    async def _asked(self, question: bytes) -> bytes:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._started()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - PIPE was asked for
        process.stdin.write(LENGTH.pack(len(question)) + question)
        await process.stdin.drain()
        (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        return await process.stdout.readexactly(size)

    async def _started(self) -> Process:
        wish = plan.ConfinementRequest(mode=plan.AVAILABLE, apart=self._home)
        return await asyncio.create_subprocess_exec(
            *plan.command(plan.plan(wish), "tether.gateway_http.bodies.large_body_process"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env=plan.environment(),
            start_new_session=True,
            limit=1 << 20,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def _error(code: str, message: str, field: str) -> TetherError:
    """Create the error in a frame of its own: the raising frame would keep the body in memory."""
    error = by_code(code, message)
    error.field = field or None
    return error


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum([len(tensor.data) for tensor in tensors])


def _large(tensors: Sequence[Tensor]) -> bool:
    return sum([_elements(tensor) for tensor in tensors]) >= LARGE // 4


def _elements(tensor: Tensor) -> int:
    """Return the approximate number of JSON values; of BYTES, a quarter of their size."""
    return len(tensor.data) // (4 if tensor.datatype == Datatype.BYTES else NUMPY_DTYPES[tensor.datatype].itemsize)
