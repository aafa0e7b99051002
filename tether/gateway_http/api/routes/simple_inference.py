"""``POST /v1/inference``: inference on plain nested lists, without tensor metadata."""

from __future__ import annotations

import msgspec

from tether.errors import InvalidRequest
from tether.gateway_http.api import request_audit
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.http.request import Headers, timeout_of
from tether.gateway_http.schemas import common

TAG = "Simple inference"


async def _inference(call: RequestContext) -> RouteReply:
    body: common.InferenceBody = call.body
    if not body.model_id:
        raise InvalidRequest("modelId is required", field="modelId")
    if isinstance(body.input_data, msgspec.UnsetType) or bytes(body.input_data) == b"null":
        raise InvalidRequest("inputData is required", field="inputData")
    gateway = call.gateway
    name = call.caller.named(body.model_id)
    call.caller.check_model(name)
    version = "" if body.version is None else str(body.version)
    served = gateway.catalog.resolve(name, version, call.heading.sticky, call.caller.id)
    inputs = await gateway.large_bodies.simple_inputs(
        call.tenant, bytes(body.input_data), served.manifest.name, served.specs
    )
    notes: Headers = []
    outputs = await gateway.infer(
        served,
        call.tenant,
        inputs,
        (),
        request_id=call.heading.request_id,
        traceparent=call.heading.traceparent,
        timeout_s=timeout_of(body.parameters, gateway.settings.request_timeout_s),
        actor=request_audit.actor(call.key),
        alias=version,
        notes=notes,
    )
    manifest = served.manifest
    shown = call.caller.shown(manifest.name)
    return RouteReply(
        await gateway.large_bodies.simple_answer(call.tenant, shown, manifest.version, outputs), headers=notes
    )


ROWS = [
    RouteSpec(
        "POST",
        "/v1/inference",
        "Run a model on plain nested lists",
        TAG,
        _inference,
        {200: common.InferenceAnswer},
        "infer",
        body=common.InferenceBody,
        large=True,
        errors=(404, 422, 429, 503, 504),
    )
]
