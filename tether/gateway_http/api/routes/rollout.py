"""How far a version is on its way to workers, as a push waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from tether.domain.job import SHARED
from tether.domain.manifest import Heartbeat, ModelRef
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.api.routes.workers import heartbeats
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.gateway_http.models.traffic_split import no_worker
from tether.gateway_http.schemas import models
from tether.model.config import ModelConfig

_NONE = "none is running; it is loaded when one starts ('tether worker')"


async def _show(call: RequestContext) -> RouteReply:
    gateway, pool = call.gateway, call.pool
    served = gateway.catalog.known(call.model(), call.path("version"))
    config = gateway.catalog.config(served.manifest.name)
    crew = _crew(await heartbeats(gateway), pool, config)
    wanted = min(config.replicas_max or len(crew), len(crew))
    ready, failures = _said(crew, served)
    state, reason = _state(gateway, served, pool)
    if state == "loading":
        reason = next(iter(failures), "")
        if not crew:
            state, reason = "no_workers", no_worker(served.manifest, pool, _NONE if pool == SHARED else "")
        elif len(failures) >= wanted:
            state = "failed"
    name, number = call.caller.shown(served.manifest.name), served.manifest.version
    told = call.caller.told(reason)
    return RouteReply(models.Rollout(name, number, state, wanted, ready, len(failures), told))


def _crew(beats: Sequence[Heartbeat], pool: str, config: ModelConfig) -> list[Heartbeat]:
    """The workers of a pool that have the labels which a model asks for."""
    wanted = config.labels.items()
    return [beat for beat in beats if beat.pool == pool and wanted <= beat.labels.items()]


def _said(crew: Sequence[Heartbeat], served: ResolvedVersion) -> tuple[int, list[str]]:
    """How many workers say that they answer for a version, and why others could not load it."""
    ref = ModelRef(served.manifest.name, served.manifest.version)
    label = f"{ref.model}:{ref.version}"
    others = [beat for beat in crew if ref not in beat.ready]
    return len(crew) - len(others), [reason for beat in others if (reason := dict(beat.failed).get(label))]


def _state(gateway: Gateway, served: ResolvedVersion, pool: str) -> tuple[models.RolloutState, str]:
    """What is decided about a version, apart from what workers say."""
    catalog, name = gateway.catalog, served.manifest.name
    if gateway.ready(served, pool):
        return "ready", catalog.reason(served, pool)
    if not catalog.loaded(name):
        return "unloaded", "the model is unloaded"
    if not catalog.serves(name, served.manifest.version):
        return "not_served", "the model's version policy does not serve it"
    if unplaced := catalog.reason(served, pool):
        return "unplaced", unplaced
    return "loading", ""


ROWS = [
    RouteSpec(
        "GET",
        "/v1/models/{name}/versions/{version}/rollout",
        "Tell how far a version is on its way to workers",
        TAG,
        _show,
        {200: models.Rollout},
        "models:write",
        errors=(404, 503),
    ),
]
