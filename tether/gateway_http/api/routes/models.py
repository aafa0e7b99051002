"""Models: list, show, push, rekey."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import AUTOMATIC, Batching, Change, PushAnswer, PushRequest, TensorSpec
from tether.domain.tenant import Tenant, check_stored_bytes
from tether.errors import InvalidRequest, PayloadTooLarge
from tether.gateway_http.api.route_spec import (
    CLIENT_WAITS,
    OCTETS,
    Header,
    Media,
    RequestContext,
    RouteReply,
    RouteSpec,
)
from tether.gateway_http.api.routes.samples import SAMPLE_LENGTH, SplitBody, keep_sample, sample_length
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.gateway_http.models.encrypted_models import PushTarget
from tether.gateway_http.schemas import common, models
from tether.model.ownership import Right
from tether.model.run_settings import effective_isolation
from tether.storage.upload import upload
from tether.wire import codec

TAG = "Models"

REGISTER_S = 280.0
"""Timeout of the inspection of a push in seconds: the broker keeps the reply permission for five minutes."""

_HEX = re.compile(r"[0-9a-fA-F]{64}")


class PushQuery(Struct, forbid_unknown_fields=True):
    """Query of a push."""

    max_batch_size: Annotated[
        int,
        Meta(
            ge=-1,
            le=65536,
            description="Maximum rows of one run; 0: not batched; -1: batched if proven safe. "
            "2 and more declare that rows are independent of one another.",
        ),
    ] = AUTOMATIC
    max_delay_ms: Annotated[
        float, Meta(ge=0, le=10_000, description="Maximum time to wait for more requests to fill a batch.")
    ] = 2.0
    version: Annotated[
        int,
        Meta(ge=0, lt=1_000_000_000, description="Expected version number, which must be the next one; 0: any."),
    ] = 0
    encrypt: Annotated[
        bool | None,
        Meta(description="Store it encrypted or in plaintext; default: as the model is."),
    ] = None


async def _list(call: RequestContext) -> RouteReply:
    catalog = call.gateway.catalog
    seen = [name for name in catalog.names() if call.caller.may_use_model(name)]
    return RouteReply(common.Models([_summary(call, name) for name in seen]))


def _summary(call: RequestContext, name: str) -> common.ModelSummary:
    gateway, pool, catalog = call.gateway, call.pool, call.gateway.catalog
    versions = catalog.versions(name)
    newest = versions[max(versions)]
    return common.ModelSummary(
        name=call.caller.shown(name),
        versions=list(versions),
        aliases=catalog.aliases(name),
        ready=gateway.ready(newest, pool),
        loaded=catalog.loaded(name),
        labels=dict(catalog.note(name, newest.manifest.version).labels),
        platform=newest.manifest.platform,
        size=newest.manifest.size,
        created_at=rfc3339(newest.manifest.created_at),
        right=_word(call.caller.right(name)),
        untried=newest.manifest.untried,
    )


def _word(right: Right) -> common.RightName:
    """Return the name of a right in responses."""
    return "own" if right is Right.OWN else "write" if right is Right.WRITE else "use"


async def _show(call: RequestContext) -> RouteReply:
    catalog, name = call.gateway.catalog, call.model(Right.USE)
    versions = catalog.versions(name)
    right = call.caller.right(name)
    details = [_detail(call.gateway, served, call.pool, right) for served in versions.values()]
    loaded = catalog.loaded(name)
    return RouteReply(
        common.ModelDetail(call.caller.shown(name), catalog.aliases(name), details, loaded=loaded, right=_word(right))
    )


def _detail(gateway: Gateway, served: ResolvedVersion, pool: str, right: Right) -> common.VersionDetail:
    """Return a version; omit file digests and publisher for callers who may only use it."""
    catalog, seals = gateway.catalog, gateway.encrypted_models
    manifest = seals.shown(served.manifest)
    finding, reads = catalog.finding(served, pool), right >= Right.WRITE
    note, batching = catalog.note(manifest.name, manifest.version), catalog.batching(served, pool)
    return common.VersionDetail(
        version=manifest.version,
        platform=manifest.platform,
        inputs=_specs(manifest.inputs),
        outputs=_specs(manifest.outputs),
        max_batch_size=batching.max_batch_size,
        max_delay_ms=batching.max_delay_ms,
        batching=_batching(batching),
        files=[common.StoredFile(file.path, file.size, file.digest if reads else "") for file in manifest.files],
        size=manifest.size,
        created_at=rfc3339(manifest.created_at),
        publisher=manifest.publisher if reads else "",
        workers=len(catalog.workers(served, pool)),
        ready=gateway.ready(served, pool),
        served=catalog.serves(manifest.name, manifest.version),
        reason=catalog.reason(served, pool),
        labels=dict(note.labels),
        note=note.note,
        encrypted=manifest.sealed is not None,
        key_generation=seals.generation(manifest),
        isolation=effective_isolation(
            manifest, catalog.config(manifest.name), finding, rule=gateway.settings.onnx_isolation
        ).value,
        isolation_reason=finding.crashed,
        untried=manifest.untried,
        signature=manifest.signature,
        signatures=list(manifest.signatures),
    )


def _batching(batching: Batching) -> common.Batching:
    return common.Batching(batching.max_batch_size, batching.max_delay_ms, batching.basis, batching.reason)


def _specs(specs: tuple[TensorSpec, ...]) -> list[common.TensorSpec]:
    return [msgspec.convert(spec, common.TensorSpec, from_attributes=True) for spec in specs]


async def _push(call: RequestContext) -> RouteReply:
    """Store the body's chunks, then ask the model store to create a version of them."""
    gateway, name = call.gateway, call.pushed_model()
    wanted, length = _wanted_digest(call), sample_length(call)
    _check_filename(call)
    limit = gateway.settings.max_upload_bytes
    if call.heading.length > limit:
        raise PayloadTooLarge(f"the model file is larger than {limit} bytes (setting max_upload_bytes)", field="body")
    if call.heading.encoding not in ("", "identity"):
        raise InvalidRequest("send the model file without Content-Encoding", field="content-encoding")
    tenant = gateway.tenants.get(call.tenant)
    query: PushQuery = call.query
    named = _chunks_of_newest(gateway, name, wanted)
    if not named:
        check_stored_bytes(tenant, gateway.catalog.stored.of(tenant.name), call.heading.length)
    target = await gateway.encrypted_models.target(name, query.encrypt, call.caller.asker)
    store = target.store
    held = None if named else tenant
    counted = partial(gateway.unreferenced_chunks.counted, tenant, store.bucket, named)
    whole = bool(wanted) or target.key is not None
    known = gateway.chunk_possession.readable(call.caller, name)
    body = SplitBody(_parts(call, held), length)
    samples = (await keep_sample(call, name, body.first(), target),) if length else ()
    file, stored = await upload(gateway.bus, store, body.rest(), limit=limit, counted=counted, whole=whole, known=known)
    if wanted and wanted != file.digest:
        raise InvalidRequest(
            f"the model file's SHA-256 is {file.digest}, but x-tether-sha256 is {wanted}; send the file again",
            field="x-tether-sha256",
        )
    wish = PushRequest(name, (file, *samples), query.max_batch_size, query.max_delay_ms, version=query.version)
    answer = await registered(call, wish, target, opening=query.encrypt is False)
    return RouteReply(pushed(call, answer, stored), 201 if answer.created else 200)


def _chunks_of_newest(gateway: Gateway, name: str, digest: str) -> frozenset[str]:
    """Return the chunks of the newest version if it is this file, since then the push adds none; else none."""
    catalog = gateway.catalog
    versions = catalog.versions(name) if name in catalog.names() else {}
    file = gateway.encrypted_models.shown(versions[max(versions)].manifest).files[0] if versions else None
    return frozenset(file.chunks) if file is not None and file.digest == digest else frozenset()


async def _parts(call: RequestContext, tenant: Tenant | None) -> AsyncIterator[bytes]:
    """Yield the parts of the body, charging each to the tenant's quota, whatever length was announced."""
    stored = 0 if tenant is None else call.gateway.catalog.stored.of(tenant.name)
    async for part in call.request.stream():
        call.gateway.storage.require()
        stored += len(part)
        if tenant is not None:
            check_stored_bytes(tenant, stored, 0)
        yield part


def _wanted_digest(call: RequestContext) -> str:
    text = call.request.headers.get("x-tether-sha256", "")
    if text and _HEX.fullmatch(text) is None:
        raise InvalidRequest("x-tether-sha256 must be 64 hex digits", field="x-tether-sha256")
    return text.lower()


def _check_filename(call: RequestContext) -> None:
    text = call.request.headers.get("x-tether-filename", "model.onnx")
    if len(text) > 255 or not text.lower().endswith(".onnx"):
        raise InvalidRequest(
            "x-tether-filename must end in .onnx: this route accepts one ONNX file; "
            "push other formats and folders with 'tether model push'",
            field="x-tether-filename",
        )


async def registered(call: RequestContext, request: PushRequest, target: PushTarget, *, opening: bool) -> PushAnswer:
    """Let the model store create the version for the caller's tenant; ``opening`` stores it in plaintext."""
    digests = {digest for file in request.files for digest in file.chunks}
    files, sealed = target.described(request.name, request.files)
    tenant, admin, by = call.caller.asker
    request = msgspec.structs.replace(
        request, tenant=tenant, admin=admin, publisher=by, files=files, sealed=sealed, open=opening
    )
    bus = call.gateway.bus
    body = await ask_owner(
        bus,
        "registerModel",
        bus.names.partition(request.name),
        MessageType.PUSH,
        codec.encode(request),
        answers=MessageType.PUSHED,
        timeout=call.waits(REGISTER_S),
    )
    call.gateway.unreferenced_chunks.drop(call.tenant, target.store.bucket, digests)
    answer = codec.decode(body, PushAnswer)
    await call.gateway.catalog.wait_for_version(answer.manifest.name, answer.manifest.version)
    return answer


def pushed(call: RequestContext, answer: PushAnswer, stored: int) -> common.PushedVersion:
    manifest = call.gateway.encrypted_models.shown(answer.manifest)
    return common.PushedVersion(
        name=call.caller.shown(manifest.name),
        version=manifest.version,
        platform=manifest.platform,
        inputs=_specs(manifest.inputs),
        outputs=_specs(manifest.outputs),
        size=manifest.size,
        digest=manifest.files[0].digest if len(manifest.files) == 1 else "",
        stored_bytes=stored,
        aliases=answer.aliases,
        encrypted=manifest.sealed is not None,
        batching=_batching(manifest.batching),
        untried=manifest.untried,
        signature=manifest.signature,
        signatures=list(manifest.signatures),
    )


async def _rekey(call: RequestContext) -> RouteReply:
    """Rotate the model's data key; versions are re-encrypted in the background."""
    gateway, name = call.gateway, call.model()
    generation = await gateway.encrypted_models.ask(Change.REKEY, name, call.caller.asker)
    versions = gateway.catalog.versions(name) if name in gateway.catalog.names() else {}
    left = [
        number
        for number, served in versions.items()
        if served.manifest.sealed is not None and gateway.encrypted_models.generation(served.manifest) != generation
    ]
    return RouteReply(models.ModelKey(call.caller.shown(name), generation, left), 202)


ROWS = [
    RouteSpec("GET", "/v1/models", "List models", TAG, _list, {200: common.Models}, "models:read"),
    RouteSpec(
        "GET",
        "/v1/models/{name}",
        "Show a model and its versions",
        TAG,
        _show,
        {200: common.ModelDetail},
        "models:read",
        errors=(404,),
    ),
    RouteSpec(
        "POST",
        "/v1/models/{name}/versions",
        "Push a model file as the next version",
        TAG,
        _push,
        {201: common.PushedVersion, 200: common.PushedVersion},
        "models:write",
        binary=Media(
            OCTETS,
            "The bytes of the .onnx file, preceded by an optional sample; 200 if the newest version is identical.",
        ),
        query=PushQuery,
        headers=(
            Header("x-tether-sha256", "Hex SHA-256 of the model file; a mismatch is rejected."),
            SAMPLE_LENGTH,
            Header("x-tether-filename", "The file's name, which must end in .onnx."),
            CLIENT_WAITS,
        ),
        errors=(404, 409, 422, 429, 504),
        grows=True,
    ),
    RouteSpec(
        "POST",
        "/v1/models/{name}/rekey",
        "Rotate the data key of an encrypted model",
        TAG,
        _rekey,
        {202: models.ModelKey},
        "models:write",
        errors=(404, 503),
    ),
]
