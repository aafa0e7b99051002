"""Decodes submissions of durable jobs, including their tensors."""

from __future__ import annotations

import msgspec

from tether.domain.job import Parameter, Priority
from tether.domain.tensor import Tensor
from tether.errors import PayloadTooLarge
from tether.wire import oip, oip_json

MAX_BATCH = 1000
"""Jobs in one ``POST /v1/jobs:batch``."""


class OutputName(msgspec.Struct, frozen=True):
    name: str


class JobBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/jobs``."""

    model: str
    inputs: list[msgspec.Raw]
    version: str | int = ""
    outputs: list[OutputName] = []
    priority: Priority | None = None
    deadline_ms: float | None = None
    parameters: dict[str, Parameter] = {}


class BatchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/jobs:batch``."""

    jobs: list[JobBody]


class SubmittedJob(msgspec.Struct, frozen=True):
    """One submitted job. ``deadline_ms`` None and an empty ``priority`` mean the defaults."""

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    priority: str = ""
    deadline_ms: float | None = None


_job_decoder = msgspec.json.Decoder(JobBody)
_batch_decoder = msgspec.json.Decoder(BatchBody)


def read_jobs(body: bytes, *, many: bool) -> list[SubmittedJob]:
    """Decode the jobs of a body, or of a batch if ``many``.

    Raises:
        BadJson, BadTensor, InvalidRequest: naming the place in the body and the invalid value.
        PayloadTooLarge: the batch has no job, or too many.
    """
    if not many:
        return [_to_submitted(oip_json.parse_body(_job_decoder, body))]
    batch: BatchBody = oip_json.parse_body(_batch_decoder, body)
    if not 0 < len(batch.jobs) <= MAX_BATCH:
        raise PayloadTooLarge(f"a batch must have 1 to {MAX_BATCH} jobs, got {len(batch.jobs)}", field="jobs")
    return [_to_submitted(job) for job in batch.jobs]


def _to_submitted(job: JobBody) -> SubmittedJob:
    oip_json.check_count(job.outputs, "outputs")
    oip_json.check_parameters(job.parameters, "parameters")
    return SubmittedJob(
        job.model,
        str(job.version),
        oip.tensors_from_json(job.inputs),
        tuple([output.name for output in job.outputs]),
        "" if job.priority is None else job.priority.value,
        job.deadline_ms,
    )
