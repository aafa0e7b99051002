"""The repository extension of the Open Inference Protocol: index, load, unload."""

from __future__ import annotations

import asyncio
from typing import Any

from tether.errors import InvalidRequest, ModelNotReady
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.model_config import set_loaded
from tether.gateway_http.api.routes.oip import TAG
from tether.gateway_http.api.routes.workers import heartbeats
from tether.gateway_http.models.catalog import Catalog, ResolvedVersion
from tether.gateway_http.models.traffic_split import no_worker
from tether.gateway_http.schemas import common, triton
from tether.gateway_http.schemas.triton_config import patch_of

_POLL_S = 0.02


async def _index(call: RequestContext) -> RouteReply:
    catalog, wanted = call.gateway.catalog, call.body.ready
    entries = [
        _entry(call, served)
        for name in catalog.names()
        if call.caller.may_use_model(name)
        for served in catalog.versions(name).values()
    ]
    return RouteReply([entry for entry in entries if entry.state == "READY" or not wanted])


def _entry(call: RequestContext, served: ResolvedVersion) -> common.IndexEntry:
    manifest = served.manifest
    state, reason = _state(call.gateway.catalog, served, call.pool)
    return common.IndexEntry(call.caller.shown(manifest.name), str(manifest.version), state, call.caller.told(reason))


def _state(catalog: Catalog, served: ResolvedVersion, pool: str) -> tuple[str, str]:
    """Return a version's state in Triton's terms, and why it is not READY."""
    name, number = served.manifest.name, served.manifest.version
    workers = catalog.workers(served, pool)
    if not catalog.loaded(name):
        return "UNLOADING" if workers else "UNAVAILABLE", "unloaded"
    if not catalog.serves(name, number):
        return "UNLOADING" if workers else "UNAVAILABLE", "the version policy does not serve it"
    if workers:
        return "READY", ""
    return "UNAVAILABLE", no_worker(served.manifest, pool, catalog.reason(served, pool))


def _parameters(call: RequestContext) -> dict[str, Any]:
    given: dict[str, Any] = call.body.parameters
    for name in given:
        if name.startswith("file:"):
            raise InvalidRequest(
                "a load cannot carry files; push them as a version: POST /v1/models/{name}/versions", field="parameters"
            )
        if name not in ("config", "unload_dependents"):
            raise InvalidRequest(
                f"unknown parameter '{name[:64]}'; expected config or unload_dependents", field="parameters"
            )
    return given


async def _load(call: RequestContext) -> RouteReply:
    name, catalog = call.model(), call.gateway.catalog
    catalog.versions(name)
    given = _parameters(call).get("config")
    if given is not None and not isinstance(given, str):
        raise InvalidRequest("parameters.config must be JSON as a string", field="parameters.config")
    patch = (
        {} if given is None else patch_of(given, (call.path("model"), call.caller.shown(name)), catalog.config(name))
    )
    await set_loaded(call, name, patch, loaded=True)
    return RouteReply(await _wait_until_hosted(call, name))


async def _wait_until_hosted(call: RequestContext, name: str) -> triton.LoadedVersion:
    """Wait until a worker hosts the version that ``latest`` points to; other versions may still be loading.

    Raises:
        ModelNotReady: no worker hosted it in time; with a worker's reason if one failed to load it.
    """
    catalog, limit_s = call.gateway.catalog, call.gateway.settings.request_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            while not call.gateway.ready(served := catalog.resolve(name, ""), call.pool):
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        version = catalog.resolve(name, "").manifest.version
        failed = [dict(beat.failed).get(f"{name}:{version}", "") for beat in await heartbeats(call.gateway)]
        reason = next(filter(None, failed), "no worker has loaded it yet")
        raise ModelNotReady(f"model '{name}' version {version} is not loaded after {limit_s:g} s: {reason}") from None
    return triton.LoadedVersion(call.caller.shown(name), str(served.manifest.version), "READY")


async def _unload(call: RequestContext) -> RouteReply:
    name, catalog = call.model(), call.gateway.catalog
    if "config" in _parameters(call):
        raise InvalidRequest("unload does not accept a configuration; send it with load", field="parameters.config")
    await set_loaded(call, name, {}, loaded=False)
    served = catalog.known(name, "")
    state = _state(catalog, served, call.pool)[0]
    return RouteReply(triton.LoadedVersion(call.caller.shown(name), str(served.manifest.version), state))


def _row(what: str, summary: str, handler: Any, errors: tuple[int, ...]) -> RouteSpec:
    return RouteSpec(
        "POST",
        "/v2/repository/models/{model}/" + what,
        summary,
        TAG,
        handler,
        {200: triton.LoadedVersion},
        "models:write",
        body=triton.RepositoryBody,
        body_optional=True,
        errors=errors,
    )


ROWS = [
    RouteSpec(
        "POST",
        "/v2/repository/index",
        "List every version with its state",
        TAG,
        _index,
        {200: list[common.IndexEntry]},
        "models:read",
        body=common.IndexBody,
        body_optional=True,
    ),
    _row("load", "Load a model, and wait until a worker hosts its newest version", _load, (404, 503)),
    _row("unload", "Unload a model from all workers until it is loaded again", _unload, (404, 503)),
]
