"""The routes that carry the load, as bare ASGI handlers: infer, submit a job, submit many."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from tether import metrics, oip, oip_json
from tether.errors import InvalidRequest, PayloadTooLarge, TetherError
from tether.gateway_http.core import Gateway
from tether.gateway_http.errors import error_response
from tether.gateway_http.jobs import NewJob
from tether.gateway_http.request import Headers, Heading, read_body, respond, timeout_of
from tether.job import Priority
from tether.ops_http import Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_BATCH = 1000
"""Jobs in one ``POST /v1/jobs:batch``."""

_JSON = b"application/json"
_BINARY = b"application/octet-stream"
_encode = msgspec.json.Encoder().encode


class OutputName(msgspec.Struct, frozen=True):
    name: str


class JobBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /v1/jobs``."""

    model: str
    inputs: list[msgspec.Raw]
    version: str | int = ""
    outputs: list[OutputName] = []
    priority: Priority = Priority.NORMAL
    deadline_ms: float | None = None
    parameters: dict[str, str | int | float | bool] = {}


class BatchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /v1/jobs:batch``."""

    jobs: list[JobBody]


_job_decoder = msgspec.json.Decoder(JobBody)
_batch_decoder = msgspec.json.Decoder(BatchBody)


class HotRoutes:
    """Handlers for one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._limit = gateway.settings.max_body_bytes
        self._timeout_s = gateway.settings.request_timeout_s
        self._counters: dict[tuple[str, int], Any] = {}

    async def infer(self, model: str, version: str, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v2/models/{model}[/versions/{version}]/infer``."""
        await self._answered("infer", self._infer(model, version, scope, receive, send), scope, send)

    async def submit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/jobs``."""
        await self._answered("jobs", self._submit(scope, receive, send), scope, send)

    async def submit_many(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/jobs:batch``."""
        await self._answered("jobs:batch", self._submit_many(scope, receive, send), scope, send)

    async def _answered(self, route: str, work: Any, scope: Scope, send: Send) -> None:
        try:
            status = await work
        except TetherError as error:
            status = await self._refuse(error, scope, send)
        except Exception:
            log.exception("a request failed", extra={"action": "request_failed"})
            status = await self._refuse(TetherError("the gateway failed; its log has the reason"), scope, send)
        counter = self._counters.get((route, status))
        if counter is None:
            counter = self._counters[route, status] = metrics.HTTP_REQUESTS.labels(route, str(status))
        counter.inc()

    async def _refuse(self, error: TetherError, scope: Scope, send: Send) -> int:
        heading = Heading([item for item in scope["headers"] if item[0] == b"x-request-id"])
        status, extra, body = error_response(error, heading.request_id)
        await respond(send, status, body, heading, content_type=_JSON, extra=extra)
        return status

    async def _infer(self, model: str, version: str, scope: Scope, receive: Receive, send: Send) -> int:
        gateway = self._gateway
        heading = Heading(scope["headers"])
        key = gateway.keys.authenticate(heading.raw, "infer")
        served = gateway.catalog.resolve(model, version)
        body = await read_body(heading, receive, self._limit)
        request = oip.parse_infer_request(body, heading.json_length, specs=served.specs)
        tensors = await gateway.infer(
            served,
            key.tenant,
            request.inputs,
            tuple([output.name for output in request.outputs]),
            request_id=heading.request_id,
            traceparent=heading.traceparent,
            timeout_s=timeout_of(request.parameters, self._timeout_s),
        )
        manifest = served.manifest
        answer, length = oip.build_infer_response(
            model=manifest.name, version=manifest.version, request=request, outputs=tensors
        )
        extra: Headers | None = None
        if length is not None:
            extra = [(b"inference-header-content-length", str(length).encode())]
        await respond(send, 200, answer, heading, content_type=_JSON if length is None else _BINARY, extra=extra)
        return 200

    async def _submit(self, scope: Scope, receive: Receive, send: Send) -> int:
        heading = Heading(scope["headers"])
        key = self._gateway.keys.authenticate(heading.raw, "jobs")
        body: JobBody = oip_json.parse(_job_decoder, await read_body(heading, receive, self._limit))
        (job,) = await self._gateway.jobs.submit(key.tenant, [self._new_job(body, heading, "")])
        location = [(b"location", f"/v1/jobs/{job['id']}".encode())]
        await respond(send, 202, _encode(job), heading, content_type=_JSON, extra=location)
        return 202

    async def _submit_many(self, scope: Scope, receive: Receive, send: Send) -> int:
        heading = Heading(scope["headers"])
        key = self._gateway.keys.authenticate(heading.raw, "jobs")
        body: BatchBody = oip_json.parse(_batch_decoder, await read_body(heading, receive, self._limit))
        if not 0 < len(body.jobs) <= MAX_BATCH:
            raise PayloadTooLarge(f"a batch has 1 to {MAX_BATCH} jobs, not {len(body.jobs)}", field="jobs")
        requests = [self._new_job(job, heading, f"/{index}") for index, job in enumerate(body.jobs)]
        jobs = await self._gateway.jobs.submit(key.tenant, requests)
        await respond(send, 202, _encode({"jobs": jobs}), heading, content_type=_JSON)
        return 202

    def _new_job(self, body: JobBody, heading: Heading, suffix: str) -> NewJob:
        settings = self._gateway.settings
        deadline_s = settings.job_deadline_s if body.deadline_ms is None else body.deadline_ms / 1000
        if not 0 < deadline_s <= 30 * 86400:
            raise InvalidRequest("deadline_ms must be more than 0 and at most 30 days", field="deadline_ms")
        key = heading.idempotency_key
        return NewJob(
            served=self._gateway.catalog.resolve(body.model, str(body.version)),
            inputs=oip.tensors_from_json(body.inputs),
            outputs=tuple([output.name for output in body.outputs]),
            priority=body.priority,
            deadline_s=deadline_s,
            idempotency_key=key + suffix if key else "",
            request_id=heading.request_id,
            traceparent=heading.traceparent,
        )
