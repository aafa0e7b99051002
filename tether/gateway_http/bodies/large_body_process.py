"""Process that decodes and encodes large JSON bodies: ``python -m
tether.gateway_http.bodies.large_body_process``.

Reads frames from standard input and replies to each on standard output: a big-endian u32 length and msgpack.
A request is ``[task, arguments...]``; a reply is ``[true, value]``, or ``[false, code, message, field]`` for
an error. Tensors are rows ``[name, datatype, shape, bytes]``.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import Tensor
from tether.errors import TetherError
from tether.gateway_http.bodies import simple_bodies
from tether.gateway_http.bodies.job_bodies import read_jobs
from tether.gateway_http.bodies.large_documents import read_document
from tether.wire import codec, oip

LENGTH = struct.Struct(">I")

Rows = Sequence[Sequence[Any]]


def rows_of(tensors: Iterable[Tensor]) -> Rows:
    return [(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in tensors]


def tensors_of(rows: Rows) -> tuple[Tensor, ...]:
    return tuple([Tensor(*row) for row in rows])


def infer_request(body: bytes, json_length: int | None) -> tuple[Any, ...]:
    """Return the fields of an :class:`oip.InferRequest`."""
    found = oip.parse_infer_request(body, json_length)
    outputs = [(output.name, output.binary, output.classification) for output in found.outputs]
    return found.id, rows_of(found.inputs), outputs, found.binary_default, found.parameters


def infer_answer(model: str, version: str, asked: tuple[str, Rows, bool], tensors: Rows) -> tuple[bytes, int | None]:
    """Encode an infer response; see :func:`oip.build_infer_response`.

    ``asked`` has the request's id, its outputs, and whether outputs are binary by default.
    """
    request_id, outputs, binary_default = asked
    wanted = tuple([oip.RequestedOutput(*row) for row in outputs])
    request = oip.InferRequest(request_id, (), wanted, binary_default)
    return oip.build_infer_response(model=model, version=version, request=request, outputs=tensors_of(tensors))


def job_outputs(tensors: Rows) -> bytes:
    """Encode the outputs of a durable job as JSON."""
    return msgspec.json.encode([oip.tensor_to_json(tensor) for tensor in tensors_of(tensors)])


def jobs(body: bytes, many: bool) -> list[tuple[Any, ...]]:
    """Return the fields of each :class:`SubmittedJob`."""
    found = read_jobs(body, many=many)
    return [(job.model, job.version, rows_of(job.inputs), job.outputs, job.priority, job.deadline_ms) for job in found]


def simple_inputs(data: bytes, model: str, specs: Rows) -> Rows:
    """Decode simple inputs; see :func:`simple_bodies.read_input`."""
    known = [TensorSpec(*row) for row in specs]
    return rows_of(simple_bodies.read_input(data, model, {spec.name: spec for spec in known}))


def simple_answer(model: str, version: int, outputs: Rows) -> bytes:
    """Encode a simple response; see :func:`simple_bodies.written`."""
    return simple_bodies.written(model, version, tensors_of(outputs))


def document(kind: str, body: bytes) -> None:
    """Validate a document with :func:`read_document`."""
    read_document(kind, body)


TASKS: Mapping[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (infer_request, infer_answer, job_outputs, jobs, simple_inputs, simple_answer, document)
}


def answer(question: bytes) -> bytes:
    task, *arguments = codec.unpack(question)
    try:
        return codec.pack((True, TASKS[task](*arguments)))
    except TetherError as error:
        return codec.pack((False, error.code, error.message, error.field or ""))


def read(source: BinaryIO, size: int) -> bytes:
    found = source.read(size)
    if len(found) != size:
        os._exit(0)  # the gateway is gone
    return found


def main() -> None:
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while True:
        (size,) = LENGTH.unpack(read(source, LENGTH.size))
        content = answer(read(source, size))
        target.write(LENGTH.pack(len(content)))
        target.write(content)
        target.flush()


if __name__ == "__main__":
    main()
