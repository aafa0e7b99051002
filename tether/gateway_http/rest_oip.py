"""The Open Inference Protocol but for inference itself, which is on the hot path."""

from __future__ import annotations

from collections.abc import Mapping

from tether import __version__, model
from tether.gateway_http import bodies
from tether.gateway_http.catalog import Catalog, Served, no_worker
from tether.gateway_http.routing import OCTETS, Call, Handler, Header, Media, Reply, Row

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration")
"""Extensions of the protocol that are served in full."""

TAG = "Open Inference Protocol"

_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"

_TRITON_TYPES = {"BYTES": "TYPE_STRING"}


async def _server(call: Call) -> Reply:
    del call
    return Reply(bodies.ServerMetadata("tether", __version__, list(EXTENSIONS)))


async def _live(call: Call) -> Reply:
    del call
    return Reply(bodies.ServerLive(live=True))


async def _ready(call: Call) -> Reply:
    ready = all(state == "ok" for state in call.gateway.checks().values())
    return Reply(bodies.ServerReady(live=True, ready=ready), 200 if ready else 400)


def _served(call: Call) -> Served:
    call.caller.check_model(call.path("model"))
    return call.gateway.catalog.resolve(call.path("model"), call.path("version"))


async def _metadata(call: Call) -> Reply:
    manifest = _served(call).manifest
    return Reply(model.metadata(manifest, tuple(call.gateway.catalog.versions(manifest.name))))


async def _model_ready(call: Call) -> Reply:
    served = _served(call)
    ready = bool(call.gateway.catalog.workers(served, call.scope))
    return Reply(bodies.ModelReady(served.manifest.name, ready), 200 if ready else 400)


async def _config(call: Call) -> Reply:
    return Reply(triton_config(_served(call).manifest))


def triton_config(manifest: model.Manifest) -> bodies.TritonConfig:
    """A version as Triton's ``ModelConfig``: Triton's datatype names, and dims without the batch axis."""
    batching = manifest.batching
    found = bodies.TritonConfig(
        name=manifest.name,
        platform=manifest.platform,
        backend=manifest.platform.partition("_")[0],
        max_batch_size=batching.max_batch_size,
        input=_config_tensors(manifest.inputs, batched=bool(batching.max_batch_size)),
        output=_config_tensors(manifest.outputs, batched=bool(batching.max_batch_size)),
        default_model_filename=manifest.files[0].path,
    )
    if batching.max_batch_size:
        found.dynamic_batching = bodies.DynamicBatching(int(batching.max_delay_ms * 1000))
    return found


def _config_tensors(specs: tuple[model.TensorSpec, ...], *, batched: bool) -> list[bodies.ConfigTensor]:
    return [
        bodies.ConfigTensor(
            spec.name,
            _TRITON_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"),
            list(spec.shape[1:] if batched else spec.shape),
        )
        for spec in specs
    ]


async def _index(call: Call) -> Reply:
    catalog, wanted = call.gateway.catalog, call.body.ready
    entries = [
        _index_entry(catalog, served, call.scope)
        for name in catalog.names()
        if call.caller.sees(name)
        for served in catalog.versions(name).values()
    ]
    return Reply([entry for entry in entries if entry.state == "READY" or not wanted])


def _index_entry(catalog: Catalog, served: Served, scope: str) -> bodies.IndexEntry:
    manifest, ready = served.manifest, bool(catalog.workers(served, scope))
    reason = "" if ready else no_worker(served, scope, catalog.reason(served, scope))
    return bodies.IndexEntry(manifest.name, str(manifest.version), "READY" if ready else "UNAVAILABLE", reason)


_LENGTH = Header("inference-header-content-length", "Bytes of the JSON part, when binary tensors follow it.")
_ENCODING = Header("content-encoding", "`gzip` or `deflate`, of the whole body.")
_BINARY = Media(OCTETS, "JSON (InferBody), followed by the bytes of the binary tensors in their order.")
_BINARY_ANSWER = Media(OCTETS, "JSON (InferAnswer), followed by the bytes of the binary tensors in their order.")


def _versioned(path: str, summary: str, handler: Handler, answers: Mapping[int, object]) -> list[Row]:
    """The same route for the version that ``latest`` names, and for a given version or alias."""
    return [
        Row("GET", root + path, summary, TAG, handler, answers, "models:read", errors=(404,))
        for root in (_MODEL, _VERSION)
    ]


def _infer_row(root: str) -> Row:
    return Row(
        "POST",
        f"{root}/infer",
        "Run a model and wait for its answer",
        TAG,
        None,
        {200: (bodies.InferAnswer, _BINARY_ANSWER)},
        "infer",
        body=bodies.InferBody,
        binary=_BINARY,
        headers=(_LENGTH, _ENCODING),
        errors=(404, 429, 503, 504),
    )


ROWS = [
    Row("GET", "/v2", "Server metadata", TAG, _server, {200: bodies.ServerMetadata}),
    Row("GET", "/v2/health/live", "Whether the server runs", TAG, _live, {200: bodies.ServerLive}),
    Row(
        "GET",
        "/v2/health/ready",
        "Whether the server can do its work",
        TAG,
        _ready,
        {200: bodies.ServerReady, 400: bodies.ServerReady},
    ),
    *_versioned("", "Model metadata", _metadata, {200: bodies.ModelMetadata}),
    *_versioned("/ready", "Whether a worker answers", _model_ready, {200: bodies.ModelReady, 400: bodies.ModelReady}),
    *_versioned("/config", "Model configuration in Triton's form", _config, {200: bodies.TritonConfig}),
    *[_infer_row(root) for root in (_MODEL, _VERSION)],
    Row(
        "POST",
        "/v2/repository/index",
        "Every version and its state",
        TAG,
        _index,
        {200: list[bodies.IndexEntry]},
        "models:read",
        body=bodies.IndexBody,
        body_optional=True,
    ),
]
