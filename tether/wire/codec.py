"""Encodes and decodes msgpack. The only importer of msgpack.

Values are positional arrays, so messages carry no field names; the order below is the format. Every decoder
checks types and counts before it builds a value, and raises only :class:`~tether.errors.BadEncoding`, with
the raw bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack
import msgspec

from tether.domain.job import AttemptNote, Failure, Job, JobId, JobRecord, JobState, Outcome, Sealed
from tether.domain.tensor import Tensor
from tether.errors import BadEncoding

MAX_ITEMS = 65536
"""Maximum number of entries in an array or map."""

T = TypeVar("T")

_packer = msgpack.Packer(use_bin_type=True, autoreset=True)


def pack(value: Any) -> bytes:
    """Encode a plain value as msgpack."""
    try:
        return bytes(_packer.pack(value))
    except MemoryError:
        _packer.reset()  # it keeps what it could not return, and would prepend it to the next value
        raise


def unpack(data: bytes) -> Any:
    """Decode untrusted bytes to a plain value: arrays become tuples, no extension types.

    Raises:
        BadEncoding: the bytes are not exactly one well-formed value within the limits.
    """
    try:
        return msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_array_len=min(MAX_ITEMS, len(data)),
            max_map_len=min(1024, len(data)),
            max_ext_len=0,
            object_pairs_hook=_no_duplicates,
            ext_hook=_no_extensions,
        )
    except BadEncoding:
        raise
    except Exception as error:
        raise BadEncoding(f"not msgpack: {type(error).__name__}", raw=data) from error


def _no_extensions(_code: int, _data: bytes) -> Any:
    raise BadEncoding("extension types are not used")


def _no_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadEncoding("a map has the same key twice")
    return found


def encode(value: msgspec.Struct) -> bytes:
    """Encode a control value (manifest, heartbeat, route ...) as a msgpack map of its fields."""
    return pack(msgspec.to_builtins(value))


def decode(data: bytes, kind: type[T]) -> T:
    """Decode a control value of type ``kind`` from :func:`encode`.

    Raises:
        BadEncoding: bytes or fields do not match ``kind``.
    """
    return _guard(data, lambda: msgspec.convert(unpack(data), kind, strict=True))


def encode_jobs(jobs: Sequence[Job]) -> bytes:
    """Encode the body of a bundle. Job ids are in the signed header instead, in the same order."""
    return pack([_job_row(job) for job in jobs])


def _job_row(job: Job) -> tuple[Any, ...]:
    if job.sealed is not None:
        return (job.tenant, job.deadline, job.request_id, job.traceparent, job.sealed.key_id, job.sealed.box)
    return (
        job.tenant,
        job.deadline,
        job.request_id,
        job.traceparent,
        job.outputs,
        _tensor_rows(job.inputs),
    )


def _tensor_rows(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.name, t.datatype, t.shape, t.data) for t in tensors]


def encode_inputs(job: Job) -> bytes:
    """Encode the plaintext of an encrypted job."""
    return pack((job.outputs, _tensor_rows(job.inputs)))


def decode_inputs(data: bytes) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Decode inputs and requested outputs from :func:`encode_inputs`.

    Raises:
        BadEncoding
    """

    def build() -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
        outputs, inputs = _row(unpack(data))
        _texts(*_row(outputs))
        return _tensors(inputs), outputs

    return _guard(data, build)


def decode_jobs(data: bytes, ids: Sequence[str]) -> list[Job]:
    """Decode the jobs of a bundle whose header has ``ids``.

    Raises:
        BadEncoding: the bytes are not a bundle, or the number of jobs differs from that of ``ids``.
    """
    return _guard(data, lambda: [_job(row, job_id) for row, job_id in zip(unpack(data), ids, strict=True)])


def _job(row: Any, job_id: str) -> Job:
    tenant, deadline, request_id, traceparent, outputs, inputs = row
    if type(outputs) is bytes:
        return _sealed_job(row, job_id)
    _texts(tenant, request_id, traceparent, *outputs)
    if type(deadline) is not float or type(outputs) is not tuple:
        raise TypeError("job")
    return Job(JobId(job_id), tenant, _tensors(inputs), deadline, outputs, request_id, traceparent)


def _sealed_job(row: Any, job_id: str) -> Job:
    tenant, deadline, request_id, traceparent, key_id, box = row
    _texts(tenant, request_id, traceparent)
    if type(deadline) is not float or type(box) is not bytes:
        raise TypeError("sealed job")
    return Job(JobId(job_id), tenant, (), deadline, (), request_id, traceparent, Sealed(key_id, box))


def _tensors(rows: Any) -> tuple[Tensor, ...]:
    return tuple([_tensor(row) for row in _row(rows)])


def _tensor(row: Any) -> Tensor:
    name, datatype, shape, data = row
    _texts(name, datatype)
    if type(data) is not bytes or type(shape) is not tuple or not all(type(axis) is int for axis in shape):
        raise TypeError("tensor")
    return Tensor(name, datatype, shape, data)


def _row(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise TypeError("array")
    return value


def _texts(*values: Any) -> None:
    for value in values:
        if type(value) is not str:
            raise TypeError("text")


def encode_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    """Encode the body of a reply bundle, or of one stored result."""
    return pack([_outcome_row(outcome) for outcome in outcomes])


def encode_end(outcome: Outcome) -> bytes:
    """Encode the plaintext of an encrypted outcome."""
    return pack((_tensor_rows(outcome.outputs), _failure_row(outcome.error)))


def decode_end(data: bytes) -> tuple[tuple[Tensor, ...], Failure | None]:
    """Decode outputs and failure from :func:`encode_end`.

    Raises:
        BadEncoding
    """

    def build() -> tuple[tuple[Tensor, ...], Failure | None]:
        outputs, error = _row(unpack(data))
        return _tensors(outputs), _failure(error)

    return _guard(data, build)


def _failure_row(error: Failure | None) -> tuple[str, str] | None:
    return None if error is None else (error.code, error.message)


def _failure(row: Any) -> Failure | None:
    if row is None:
        return None
    code, message = _row(row)
    _texts(code, message)
    return Failure(code, message)


def _outcome_row(outcome: Outcome) -> tuple[Any, ...]:
    sealed = outcome.sealed
    return (
        outcome.job,
        outcome.state.value,
        _tensor_rows(outcome.outputs) if sealed is None else sealed.key_id,
        _failure_row(outcome.error) if sealed is None else sealed.box,
        outcome.attempts,
        outcome.worker,
        outcome.started_at,
        outcome.finished_at,
    )


def decode_outcomes(data: bytes) -> list[Outcome]:
    """Decode the outcomes from :func:`encode_outcomes`.

    Raises:
        BadEncoding: the bytes are not a reply bundle.
    """
    return _guard(data, lambda: [_outcome(row) for row in unpack(data)])


def _outcome(row: Any) -> Outcome:
    job, state, outputs, error, attempts, worker, started_at, finished_at = row
    _texts(job, worker)
    if type(attempts) is not int or type(started_at) is not float or type(finished_at) is not float:
        raise TypeError("outcome")
    end = JobId(job), JobState(state)
    if type(outputs) is bytes and type(error) is bytes:
        sealed = Sealed(outputs, error)
        return Outcome(*end, (), None, attempts, worker, started_at, finished_at, sealed)
    return Outcome(*end, _tensors(outputs), _failure(error), attempts, worker, started_at, finished_at)


def encode_record(record: JobRecord) -> bytes:
    return encode(record)


def decode_record(data: bytes) -> JobRecord:
    return decode(data, JobRecord)


def decode_note(data: bytes) -> AttemptNote:
    return decode(data, AttemptNote)


def _guard(data: bytes, build: Callable[[], T]) -> T:
    try:
        return build()
    except BadEncoding:
        raise
    except (TypeError, ValueError, msgspec.ValidationError, RecursionError) as error:
        raise BadEncoding(f"the message does not have the expected form: {error}"[:200], raw=data) from error
