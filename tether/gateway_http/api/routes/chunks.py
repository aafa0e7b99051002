"""Resumable pushes: list missing chunks, upload each, then register the version."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import msgspec
from msgspec.structs import replace

from tether.domain.chunking import LARGEST, digest_of
from tether.domain.manifest import ModelFile, PushRequest
from tether.errors import BadEncoding, InvalidRequest, NotFound, PayloadTooLarge
from tether.gateway_http.api.route_spec import CLIENT_WAITS, OCTETS, Media, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.model_config import checked_patch
from tether.gateway_http.api.routes.models import TAG, pushed, registered
from tether.gateway_http.api.routes.samples import keep_sample
from tether.gateway_http.schemas import common, models
from tether.model import sample
from tether.storage.model_files import check_file

_DIGEST = re.compile(r"[0-9a-f]{64}")


def _digest(text: str, field: str) -> str:
    if _DIGEST.fullmatch(text) is None:
        raise InvalidRequest(f"{field} must be 64 lower-case hex digits: the SHA-256 of the chunk", field=field)
    return text


async def _missing(call: RequestContext) -> RouteReply:
    """Report chunks that only other tenants sent as missing."""
    name, asked = call.pushed_model(), [_digest(text, "chunks") for text in call.body.chunks]
    seals, possession = call.gateway.encrypted_models, call.gateway.chunk_possession
    encrypted = await seals.encrypts(name, call.body.encrypt)
    if encrypted and seals.keyring.stored(name) is None:  # its key is created with its first chunk
        return RouteReply(models.MissingChunks(list(dict.fromkeys(asked)), encrypted))
    store = (await seals.target(name, encrypted, call.caller.asker)).store
    shown = await possession.shown(call.caller, name, asked, store.name_of)
    lost = set(await store.missing([digest for digest in asked if digest in shown]))
    missing = [digest for digest in dict.fromkeys(asked) if digest in lost or digest not in shown]
    return RouteReply(models.MissingChunks(missing, encrypted))


async def _put(call: RequestContext) -> RouteReply:
    name, digest = call.pushed_model(), _digest(call.path("digest"), "digest")
    chunk = await _chunk(call)
    if await asyncio.to_thread(digest_of, chunk) != digest:
        raise InvalidRequest(
            "the SHA-256 of the body differs from the digest in the path; send the chunk with that digest",
            field="body",
        )

    store = (await call.gateway.encrypted_models.target(name, call.query.encrypt, call.caller.asker)).store

    async def only() -> AsyncIterator[tuple[str, bytes]]:
        yield digest, chunk

    tenant, loose = call.gateway.tenants.get(call.tenant), call.gateway.unreferenced_chunks
    counted = await loose.take(tenant, store.bucket, digest, len(chunk))
    shown = await call.gateway.chunk_possession.shown(call.caller, name, [digest], store.name_of)
    stored = await store.put(only(), shown)
    if counted and not stored:
        loose.drop(tenant.name, store.bucket, [digest])
    await call.gateway.chunk_possession.note(tenant.name, store.name_of(digest))
    return RouteReply(models.StoredChunk(digest, len(chunk), stored), 201 if stored else 200)


async def _chunk(call: RequestContext) -> bytes:
    if call.heading.encoding not in ("", "identity"):
        raise InvalidRequest("send the chunk without Content-Encoding", field="content-encoding")
    found = bytearray()
    async for part in call.request.stream():
        found += part
        if len(found) > LARGEST:
            raise PayloadTooLarge(f"a chunk must have at most {LARGEST} bytes", field="body")
    return bytes(found)


async def _register(call: RequestContext) -> RouteReply:
    name, wanted = call.pushed_model(), call.body
    files = tuple(
        ModelFile(file.path, file.size, file.digest, tuple(file.chunks), tuple(file.sizes)) for file in wanted.files
    )
    request = PushRequest(
        name,
        files,
        wanted.max_batch_size,
        wanted.max_delay_ms,
        isolation=wanted.isolation,
        run_timeout_s=wanted.run_timeout_s,
        platform=wanted.platform,
        trusted="models:code" in call.caller.scopes,
        config=checked_patch(call, name, wanted.config),
        version=wanted.version,
        about={"labels": wanted.labels, "note": wanted.note} if wanted.labels or wanted.note else {},
        signature=wanted.signature,
    )
    target = await call.gateway.encrypted_models.target(name, wanted.encrypt, call.caller.asker)
    digests = await asyncio.to_thread(_digests, files, sealed=target.key is not None)  # takes 1 ms for 1,000
    await call.gateway.chunk_possession.require(call.caller, name, digests, target.store.name_of)
    if wanted.sample:
        given = [file for file in files if file.path != sample.PATH]
        content = _only(msgspec.json.encode(wanted.sample))
        request = replace(request, files=(*given, await keep_sample(call, name, content, target)))
    answer = await registered(call, request, target, opening=wanted.encrypt is False)
    return RouteReply(pushed(call, answer, 0), 201 if answer.created else 200)


async def _only(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _digests(files: Sequence[ModelFile], *, sealed: bool) -> list[str]:
    try:
        for file in files:
            check_file(file, whole=sealed)
    except BadEncoding as error:
        raise InvalidRequest(error.message, field="files") from error
    return [digest for file in files for digest in file.chunks]


async def _files(call: RequestContext) -> RouteReply:
    """List the files of a version, if the caller may read them: using a model is not enough."""
    manifest = call.gateway.encrypted_models.plain(
        call.gateway.catalog.known(call.model(), call.path("version")).manifest
    )
    files = [_described(file) for file in manifest.files]
    return RouteReply(models.VersionFiles(call.caller.shown(manifest.name), manifest.version, manifest.platform, files))


def _described(file: ModelFile) -> models.NewFile:
    chunks, sizes = [digest for digest, _ in file.sized_chunks()], [size for _, size in file.sized_chunks()]
    return models.NewFile(file.path, file.size, file.digest, chunks, sizes)


async def _get(call: RequestContext) -> RouteReply:
    """Return a chunk of a version that the caller may read."""
    name, digest = call.model(), _digest(call.path("digest"), "digest")
    seals = call.gateway.encrypted_models
    manifest = call.gateway.catalog.known(name, call.path("version")).manifest
    if not any(digest in file.chunks for file in seals.plain(manifest).files):
        raise NotFound(f"version {manifest.version} of model '{name}' has no chunk {digest}", field="digest")
    async with aclosing(seals.store(manifest).get([digest])) as chunks:
        return RouteReply(await anext(chunks), content_type=OCTETS, pack=False)


_VERSION = "/v1/models/{name}/versions/{version}"

ROWS = [
    RouteSpec(
        "GET",
        f"{_VERSION}/files",
        "List the files of a version and their chunks",
        TAG,
        _files,
        {200: models.VersionFiles},
        "models:read",
        errors=(404,),
    ),
    RouteSpec(
        "GET",
        f"{_VERSION}/chunks/{{digest}}",
        "Download one chunk of a version",
        TAG,
        _get,
        {200: Media(OCTETS, "The chunk; verify its SHA-256 against the digest.")},
        "models:read",
        errors=(404, 503, 504),
    ),
    RouteSpec(
        "POST",
        "/v1/models/{name}/chunks:missing",
        "List the chunks of a file that must be uploaded",
        TAG,
        _missing,
        {200: models.MissingChunks},
        "models:write",
        body=models.WantedChunks,
        large=True,
        headers=(CLIENT_WAITS,),
        errors=(404, 503, 504),
    ),
    RouteSpec(
        "PUT",
        "/v1/models/{name}/chunks/{digest}",
        "Store one chunk of a model file",
        TAG,
        _put,
        {201: models.StoredChunk, 200: models.StoredChunk},
        "models:write",
        query=models.ChunkQuery,
        binary=Media(OCTETS, "At most 4 MiB with the SHA-256 in the path; 200 if it was stored already."),
        headers=(CLIENT_WAITS,),
        errors=(404, 429, 504),
        grows=True,
    ),
    RouteSpec(
        "POST",
        "/v1/models/{name}/versions:register",
        "Register stored chunks as the next version",
        TAG,
        _register,
        {201: common.PushedVersion, 200: common.PushedVersion},
        "models:write",
        body=models.NewVersion,
        large=True,
        headers=(CLIENT_WAITS,),
        errors=(404, 409, 422, 429, 504),
        grows=True,
    ),
]
