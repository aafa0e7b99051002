"""What became of the copies of requests for a model's shadow versions."""

from __future__ import annotations

from tether.gateway_http import bodies_models
from tether.gateway_http.comparison import Verdict
from tether.gateway_http.job_view import rfc3339
from tether.gateway_http.rest_models import TAG
from tether.gateway_http.routing import Call, Reply, Row
from tether.gateway_http.shadows import Tally
from tether.model_config import Shadow


async def _show(call: Call) -> Reply:
    gateway, name = call.gateway, call.model()
    gateway.catalog.versions(name)
    tallies = gateway.extras.shadows.tallies(name)
    told = [_tally(shadow, tally) for shadow, tally in tallies.items()]
    return Reply(bodies_models.Shadows(call.caller.shown(name), told))


def _tally(shadow: Shadow, tally: Tally) -> bodies_models.ShadowTally:
    counts = tally.counts
    return bodies_models.ShadowTally(
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
    Row(
        "GET",
        "/v1/models/{name}/shadows",
        "Show how shadow versions' answers compare with those that callers got",
        TAG,
        _show,
        {200: bodies_models.Shadows},
        "models:read",
        errors=(404,),
    ),
]
