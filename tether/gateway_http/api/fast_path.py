"""The busiest routes, served without a framework: infer, submit a job, submit a batch."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from tether.domain.job import LONGEST_DEADLINE_S, Priority
from tether.domain.model_names import RESERVED
from tether.errors import InvalidRequest, TetherError
from tether.gateway_http.access.authentication import Caller
from tether.gateway_http.access.rate_limits import LimitPermit
from tether.gateway_http.api import log_text, request_audit
from tether.gateway_http.bodies.job_bodies import SubmittedJob
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http.error_responses import error_response
from tether.gateway_http.http.request import (
    Handler,
    Headers,
    HttpReply,
    IncomingRequest,
    RequestHeaders,
    build_reply,
    build_reply_async,
    headers_with_id_only,
    read_body,
    timeout_of,
)
from tether.gateway_http.jobs.submission import NewJob
from tether.gateway_http.jobs.view import shown_job
from tether.process import metrics

_JSON = "application/json"
_BINARY = "application/octet-stream"
_encode = msgspec.json.Encoder().encode


Work = Callable[[IncomingRequest, RequestHeaders, Caller, LimitPermit | None], Coroutine[Any, Any, HttpReply]]
"""Handles an admitted request."""


class FastPath:
    """Fast-path handlers of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._limit = gateway.settings.max_body_bytes
        self._timeout_s = gateway.settings.request_timeout_s
        self._counters: dict[tuple[str, int], Any] = {}

    def find(self, method: str, path: str) -> Handler | None:
        """Return the handler of a fast-path request, or None for other routes. ``path`` is decoded."""
        if method != "POST":
            return None
        if path.startswith("/v2/models/") and path.endswith("/infer"):
            parts = path.split("/")
            if len(parts) in (6, 8) and parts[4] not in RESERVED:
                parts[3:5] = [f"{parts[3]}/{parts[4]}"]
            if len(parts) == 5:
                return partial(self._handle, "infer", "infer", partial(self._infer, parts[3], ""))
            if len(parts) == 7 and parts[4] == "versions":
                return partial(self._handle, "infer", "infer", partial(self._infer, parts[3], parts[5]))
        elif path == "/v1/jobs":
            return partial(self._handle, "jobs", "jobs", self._submit)
        elif path == "/v1/jobs:batch":
            return partial(self._handle, "jobs:batch", "jobs", self._submit_many)
        return None

    async def _handle(self, route: str, scope: str, work: Work, incoming: IncomingRequest) -> HttpReply:
        """Authenticate, check limits, run ``work``, and release the limits in any case."""
        ticket = key = None
        try:
            heading = RequestHeaders(incoming.headers)
            key = await self._gateway.authenticated(heading, scope)
            ticket = self._gateway.limits.enter(key.key)
            answer = await work(incoming, heading, key, ticket)
        except TetherError as error:
            if route != "infer":
                error = self._gateway.storage.explained(
                    error
                )  # rebind: another name would outlive this block and keep the request in memory
            request_audit.refused(self._gateway, error, incoming, route)
            answer = self._refusal(error, incoming, key)
        except Exception as error:  # noqa: BLE001 - logged
            log_text.failed(
                error, headers_with_id_only(incoming.headers).request_id, sealed=log_text.sealed(self._gateway, key)
            )
            answer = self._refusal(TetherError("internal error of the gateway; see its log"), incoming, key)
        finally:
            if ticket is not None:
                ticket.leave()
        if ticket is not None:
            answer.headers.extend(ticket.headers())
        counter = self._counters.get((route, answer.status))
        if counter is None:
            counter = metrics.HTTP_REQUESTS.labels(route, str(answer.status))
            self._counters[route, answer.status] = counter
        counter.inc()
        return answer

    def _refusal(self, error: TetherError, incoming: IncomingRequest, caller: Caller | None) -> HttpReply:
        heading = headers_with_id_only(incoming.headers)
        message = error.message if caller is None else caller.told(error.message)
        status, extra, body = error_response(error, heading.request_id, message)
        log_text.refused(error, status, heading.request_id, sealed=log_text.sealed(self._gateway, caller))
        return build_reply(status, body, heading, content_type=_JSON, extra=extra)

    def _body(self, heading: RequestHeaders, incoming: IncomingRequest) -> Coroutine[Any, Any, bytes]:
        return read_body(heading, incoming, self._limit, self._gateway.body_timeouts)

    async def _infer(
        self,
        model: str,
        version: str,
        incoming: IncomingRequest,
        heading: RequestHeaders,
        key: Caller,
        _ticket: LimitPermit | None,
    ) -> HttpReply:
        """Handle ``POST /v2/models/{model}[/versions/{version}]/infer``."""
        gateway = self._gateway
        name = key.named(model)
        key.check_model(name)
        served = gateway.catalog.resolve(name, version, heading.sticky, key.id)
        body = await self._body(heading, incoming)
        request = await gateway.large_bodies.infer_request(key.tenant, body, heading.json_length, served.specs)
        extra: Headers = []
        tensors = await gateway.infer(
            served,
            key.tenant,
            request.inputs,
            tuple([output.name for output in request.outputs]),
            request_id=heading.request_id,
            traceparent=heading.traceparent,
            timeout_s=timeout_of(request.parameters, self._timeout_s),
            actor=f"key:{key.id}",
            alias=version,
            notes=extra,
        )
        manifest = served.manifest
        answer, length = await gateway.large_bodies.infer_answer(
            key.tenant, key.shown(manifest.name), manifest.version, request, tensors
        )
        if length is None:
            return await build_reply_async(200, answer, heading, content_type=_JSON, extra=extra)
        extra.append(("inference-header-content-length", str(length)))
        return await build_reply_async(200, answer, heading, content_type=_BINARY, extra=extra)

    async def _submit(
        self, incoming: IncomingRequest, heading: RequestHeaders, key: Caller, _ticket: LimitPermit | None
    ) -> HttpReply:
        """Handle ``POST /v1/jobs``."""
        wanted = await self._gateway.large_bodies.jobs(key.tenant, await self._body(heading, incoming), many=False)
        (job,) = await self._submit_and_audit(key, [self._new_job(key, wanted[0], heading, "")])
        extra = [("location", f"/v1/jobs/{job['id']}")]
        return build_reply(202, _encode(job), heading, content_type=_JSON, extra=extra)

    async def _submit_many(
        self, incoming: IncomingRequest, heading: RequestHeaders, key: Caller, ticket: LimitPermit | None
    ) -> HttpReply:
        """Handle ``POST /v1/jobs:batch``; each job counts as one request."""
        wanted = await self._gateway.large_bodies.jobs(key.tenant, await self._body(heading, incoming), many=True)
        if ticket is not None:
            ticket.count(len(wanted) - 1)
        requests = [self._new_job(key, job, heading, f"/{index}") for index, job in enumerate(wanted)]
        jobs = await self._submit_and_audit(key, requests)
        return build_reply(202, _encode({"jobs": jobs}), heading, content_type=_JSON)

    async def _submit_and_audit(self, key: Caller, requests: list[NewJob]) -> list[dict[str, Any]]:
        self._gateway.storage.require()
        jobs = await self._gateway.jobs.submit(key.tenant, requests)
        sizes = [sum([len(tensor.data) for tensor in request.inputs]) for request in requests]
        request_audit.submitted(self._gateway, key, jobs, sizes, requests[0].request_id)
        return [shown_job(job, key.shown, key.told) for job in jobs]

    def _new_job(self, caller: Caller, wanted: SubmittedJob, heading: RequestHeaders, suffix: str) -> NewJob:
        settings = self._gateway.settings
        deadline_s = settings.job_deadline_s if wanted.deadline_ms is None else wanted.deadline_ms / 1000
        if not 0 < deadline_s <= LONGEST_DEADLINE_S:
            raise InvalidRequest("deadline_ms must be more than 0 and at most 30 days", field="deadline_ms")
        name = caller.named(wanted.model)
        caller.check_model(name)
        key = heading.idempotency_key
        return NewJob(
            served=self._gateway.catalog.resolve(name, wanted.version, heading.sticky, caller.id),
            inputs=wanted.inputs,
            outputs=wanted.outputs,
            priority=Priority(wanted.priority) if wanted.priority else None,
            deadline_s=deadline_s,
            idempotency_key=key + suffix if key else "",
            request_id=heading.request_id,
            traceparent=heading.traceparent,
        )
