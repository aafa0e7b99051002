"""Statistics of a model's shadow versions."""

from __future__ import annotations

from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.inference.output_comparison import Verdict
from tether.gateway_http.inference.shadow_traffic import ShadowStats
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import models
from tether.model.config import Shadow


async def _show(call: RequestContext) -> RouteReply:
    gateway, name = call.gateway, call.model()
    gateway.catalog.versions(name)
    tallies = gateway.features.shadows.tallies(name)
    stats = [_tally(shadow, tally) for shadow, tally in tallies.items()]
    return RouteReply(models.Shadows(call.caller.shown(name), stats))


def _tally(shadow: Shadow, tally: ShadowStats) -> models.ShadowTally:
    counts = tally.counts
    return models.ShadowTally(
        version=shadow.version,
        percent=shadow.percent,
        alias=shadow.alias,
        since=rfc3339(tally.since),
        equal=counts[Verdict.EQUAL],
        close=counts[Verdict.CLOSE],
        different=counts[Verdict.DIFFERENT],
        error=counts[Verdict.ERROR],
        unavailable=counts[Verdict.UNAVAILABLE],
        dropped=counts[Verdict.DROPPED],
        largest_difference=tally.largest_difference,
        last_error=tally.last_error,
    )


ROWS = [
    RouteSpec(
        "GET",
        "/v1/models/{name}/shadows",
        "Compare the outputs of shadow versions with those that callers got",
        TAG,
        _show,
        {200: models.Shadows},
        "models:read",
        errors=(404,),
    ),
]
