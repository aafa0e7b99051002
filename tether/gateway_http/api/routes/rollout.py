"""Rollout of a version to workers, as a push waits for it."""

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

_NONE = "none is running; start one with 'tether worker'"


async def _show(call: RequestContext) -> RouteReply:
    gateway, pool = call.gateway, call.pool
    served = gateway.catalog.known(call.model(), call.path("version"))
    config = gateway.catalog.config(served.manifest.name)
    crew = _eligible(await heartbeats(gateway), pool, config)
    wanted = min(config.replicas_max or len(crew), len(crew))
    ready, failures = _loaded_and_failed(crew, served)
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


def _eligible(beats: Sequence[Heartbeat], pool: str, config: ModelConfig) -> list[Heartbeat]:
    """Return a pool's workers that have the labels of the model's configuration."""
    wanted = config.labels.items()
    return [beat for beat in beats if beat.pool == pool and wanted <= beat.labels.items()]


def _loaded_and_failed(crew: Sequence[Heartbeat], served: ResolvedVersion) -> tuple[int, list[str]]:
    """Return how many workers host a version, and why others failed to load it."""
    ref = ModelRef(served.manifest.name, served.manifest.version)
    label = f"{ref.model}:{ref.version}"
    others = [beat for beat in crew if ref not in beat.ready]
    return len(crew) - len(others), [reason for beat in others if (reason := dict(beat.failed).get(label))]


def _state(gateway: Gateway, served: ResolvedVersion, pool: str) -> tuple[models.RolloutState, str]:
    """Return the state of a version that the gateway knows without the workers' heartbeats."""
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
        "Show the rollout of a version to workers",
        TAG,
        _show,
        {200: models.Rollout},
        "models:write",
        errors=(404, 503),
    ),
]
