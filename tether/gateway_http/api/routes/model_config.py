"""Model configuration: show, change, reset."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.errors import InvalidRequest
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.bodies.large_documents import check_config
from tether.gateway_http.schemas import models
from tether.model.config import ModelConfig
from tether.model.config_patch import ANY_REVISION, ENDPOINT, ConfigAction, ConfigRequest, patched
from tether.model.ownership import Right
from tether.model.version_metadata import VersionNote, noted, patch_of
from tether.wire import codec

_SEEN_S = 2.0
"""Seconds that a reply waits for this gateway to see a change, so that the next request uses it."""


def checked_patch(call: RequestContext, name: str, patch: Mapping[str, Any]) -> dict[str, Any]:
    """Check and return a patch for the model store.

    Raises:
        InvalidRequest: naming the invalid field.
        PayloadTooLarge: the patch is larger than any configuration.
    """
    check_config(patch)
    if patch:
        patched(call.gateway.catalog.config(name), patch)
    return dict(patch)


async def _configured(call: RequestContext, request: ConfigRequest) -> ModelConfig:
    """Let the model store change a configuration, and wait until this gateway uses it."""
    config = codec.decode(await _asked(call, request), ModelConfig)
    await wait_until_seen(lambda: call.gateway.catalog.config(config.model).revision >= config.revision)
    return config


async def _asked(call: RequestContext, request: ConfigRequest) -> bytes:
    request = msgspec.structs.replace(request, **call.caller.asker._asdict())
    bus, body = call.gateway.bus, codec.encode(request)
    return await ask_owner(
        bus,
        ENDPOINT,
        bus.names.partition(request.model),
        MessageType.CHANGE,
        body,
        answers=MessageType.CHANGED,
        timeout=30.0,
        again=request.revision == ANY_REVISION,
    )


async def wait_until_seen(true: Callable[[], bool]) -> None:
    """Wait until this gateway sees a change, up to a limit: the change is stored in any case."""
    try:
        async with asyncio.timeout(_SEEN_S):
            while not true():
                await asyncio.sleep(0.005)
    except TimeoutError:
        return


async def _show(call: RequestContext) -> RouteReply:
    name, catalog = call.model(Right.USE), call.gateway.catalog
    catalog.versions(name)
    config = catalog.config(name)
    if call.caller.right(name) < Right.WRITE:
        config = msgspec.structs.replace(config, changed_by="")
    return _answer(call, config)


def _answer(call: RequestContext, told: ModelConfig | VersionNote) -> RouteReply:
    """Return a configuration or note with the model's name as the caller writes it."""
    return RouteReply(msgspec.structs.replace(told, model=call.caller.shown(told.model)))


async def _change(call: RequestContext) -> RouteReply:
    name = call.model()
    call.gateway.catalog.versions(name)
    patch = checked_patch(call, name, call.body)
    return _answer(call, await _configured(call, ConfigRequest(ConfigAction.CHANGE, name, patch, call.query.revision)))


async def _reset(call: RequestContext) -> RouteReply:
    name = call.model()
    request = ConfigRequest(ConfigAction.RESET, name, revision=call.query.revision)
    call.gateway.catalog.versions(name)
    return _answer(call, await _configured(call, request))


async def set_loaded(call: RequestContext, name: str, patch: Mapping[str, Any], *, loaded: bool) -> ModelConfig:
    """Load a model with further changes, or unload it."""
    call.gateway.catalog.versions(name)
    changes = checked_patch(call, name, {**patch, "loaded": loaded})
    return await _configured(call, ConfigRequest(ConfigAction.CHANGE, name, changes, ANY_REVISION))


async def _annotate(call: RequestContext) -> RouteReply:
    """Change labels and note. The model store checks the version: this gateway may not have seen a new one."""
    name, text = call.model(), call.path("version")
    call.gateway.catalog.versions(name)
    if not text.isdecimal() or not 0 < len(text) < 10:
        raise InvalidRequest("version must be a number: aliases have no labels", field="version")
    patch = {key: value for key, value in msgspec.to_builtins(call.body).items() if value is not None}
    noted(VersionNote(name, int(text)), patch_of(patch))
    request = ConfigRequest(ConfigAction.NOTE, name, patch, version=int(text))
    note = codec.decode(await _asked(call, request), VersionNote)
    await wait_until_seen(lambda: call.gateway.catalog.note(name, note.version).revision >= note.revision)
    return _answer(call, note)


_PATH = "/v1/models/{name}/config"

ROWS = [
    RouteSpec(
        "PATCH",
        "/v1/models/{name}/versions/{version}",
        "Change labels and note of a version",
        TAG,
        _annotate,
        {200: VersionNote},
        "models:write",
        body=models.WantedNote,
        errors=(404, 503),
    ),
    RouteSpec(
        "GET", _PATH, "Show a model's configuration", TAG, _show, {200: ModelConfig}, "models:read", errors=(404,)
    ),
    RouteSpec(
        "PATCH",
        _PATH,
        "Change a model's configuration by a merge patch (RFC 7396)",
        TAG,
        _change,
        {200: ModelConfig},
        "models:write",
        body=models.ConfigPatch,
        query=models.ConfigQuery,
        errors=(404, 409, 503),
    ),
    RouteSpec(
        "DELETE",
        _PATH,
        "Reset a model's configuration to the default; an unloaded model stays unloaded",
        TAG,
        _reset,
        {200: ModelConfig},
        "models:write",
        query=models.ConfigQuery,
        errors=(404, 409, 503),
    ),
]
