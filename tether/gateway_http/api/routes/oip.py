"""The Open Inference Protocol, except inference itself, which is on the fast path."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tether import __version__
from tether.domain.manifest import Manifest, metadata
from tether.gateway_http.api.route_spec import OCTETS, Handler, Header, Media, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.gateway_http.schemas import common, triton
from tether.gateway_http.schemas.triton_config import triton_config
from tether.model.ownership import Right

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository")
"""Fully supported extensions of the protocol."""

TAG = "Open Inference Protocol"

_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"


async def _server(call: RequestContext) -> RouteReply:
    del call
    return RouteReply(common.ServerMetadata("tether", __version__, list(EXTENSIONS)))


async def _live(call: RequestContext) -> RouteReply:
    del call
    return RouteReply(common.ServerLive(live=True))


async def _ready(call: RequestContext) -> RouteReply:
    ready = call.gateway.readiness.infers()
    return RouteReply(common.ServerReady(live=True, ready=ready), 200 if ready else 400)


def _served(call: RequestContext) -> ResolvedVersion:
    return call.gateway.catalog.resolve(call.model(Right.USE), call.path("version"))


def _shown(call: RequestContext, manifest: Manifest) -> Manifest:
    """Return a manifest with the model's name as the caller writes it."""
    return msgspec.structs.replace(manifest, name=call.caller.shown(manifest.name))


async def _metadata(call: RequestContext) -> RouteReply:
    manifest = _served(call).manifest
    return RouteReply(metadata(_shown(call, manifest), tuple(call.gateway.catalog.versions(manifest.name))))


async def _model_ready(call: RequestContext) -> RouteReply:
    served = _served(call)
    ready = call.gateway.ready(served, call.pool)
    return RouteReply(common.ModelReady(call.caller.shown(served.manifest.name), ready), 200 if ready else 400)


async def _config(call: RequestContext) -> RouteReply:
    served = _served(call)
    catalog = call.gateway.catalog
    config, batching = catalog.config(served.manifest.name), catalog.batching(served, call.pool)
    return RouteReply(triton_config(_shown(call, served.manifest), config, batching))


_LENGTH = Header("inference-header-content-length", "Bytes of the JSON part, if binary tensors follow it.")
_ENCODING = Header("content-encoding", "`gzip` or `deflate`, of the whole body.")
_BINARY = Media(OCTETS, "JSON (InferBody), followed by the bytes of the binary tensors in their order.")
_BINARY_ANSWER = Media(OCTETS, "JSON (InferAnswer), followed by the bytes of the binary tensors in their order.")


def _versioned(path: str, summary: str, handler: Handler, answers: Mapping[int, object]) -> list[RouteSpec]:
    """Return the route for ``latest`` and the route for a given version or alias."""
    return [
        RouteSpec("GET", root + path, summary, TAG, handler, answers, "models:read", errors=(404,))
        for root in (_MODEL, _VERSION)
    ]


def _infer_row(root: str) -> RouteSpec:
    return RouteSpec(
        "POST",
        f"{root}/infer",
        "Run a model and wait for its outputs",
        TAG,
        None,
        {200: (common.InferAnswer, _BINARY_ANSWER)},
        "infer",
        body=common.InferBody,
        binary=_BINARY,
        headers=(_LENGTH, _ENCODING),
        errors=(404, 422, 429, 503, 504),
    )


ROWS = [
    RouteSpec("GET", "/v2", "Server metadata", TAG, _server, {200: common.ServerMetadata}),
    RouteSpec("GET", "/v2/health/live", "Check that the server runs", TAG, _live, {200: common.ServerLive}),
    RouteSpec(
        "GET",
        "/v2/health/ready",
        "Check that synchronous requests are served; they need no disk",
        TAG,
        _ready,
        {200: common.ServerReady, 400: common.ServerReady},
    ),
    *_versioned("", "Model metadata", _metadata, {200: common.ModelMetadata}),
    *_versioned(
        "/ready", "Check that a worker hosts the model", _model_ready, {200: common.ModelReady, 400: common.ModelReady}
    ),
    *_versioned("/config", "Model configuration in Triton's format", _config, {200: triton.TritonConfig}),
    *[_infer_row(root) for root in (_MODEL, _VERSION)],
]
