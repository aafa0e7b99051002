"""Health, metrics, documentation."""

from __future__ import annotations

from collections.abc import Callable

from tether.gateway_http.api.route_spec import Handler, Media, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.schemas import common
from tether.process import metrics

TAG = "Operations"

_NO_SCRIPTS = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def _nothing(model: str) -> bool:
    del model
    return False


async def _healthz(call: RequestContext) -> RouteReply:
    del call
    return RouteReply(common.ServerLive(live=True))


async def _readyz(call: RequestContext) -> RouteReply:
    checks = call.gateway.checks()
    ready = all(state == "ok" for state in checks.values())
    return RouteReply(common.Readiness(ready, checks), 200 if ready else 503)


async def _metrics(call: RequestContext) -> RouteReply:
    """Return metrics; those that name a model only for a key that may use the model."""
    text = call.heading.key
    shows = call.gateway.keys.authenticate(text, "metrics").may_use_model if text else _nothing
    metrics.dependencies(call.gateway.checks())
    content, content_type = metrics.exposition(shows)
    return RouteReply(content, content_type=content_type)


def rows(document: Callable[[], bytes], page: Callable[[], bytes]) -> list[RouteSpec]:
    """Return the routes; ``document`` and ``page`` are called on first use."""

    async def openapi(call: RequestContext) -> RouteReply:
        del call
        return RouteReply(document())

    async def docs(call: RequestContext) -> RouteReply:
        del call
        return RouteReply(
            page(), content_type="text/html; charset=utf-8", headers=[("content-security-policy", _NO_SCRIPTS)]
        )

    return [
        _row("/healthz", "Check that the gateway runs", _healthz, common.ServerLive),
        RouteSpec(
            "GET",
            "/readyz",
            "Check that the gateway's dependencies work",
            TAG,
            _readyz,
            {200: common.Readiness, 503: common.Readiness},
        ),
        RouteSpec(
            "GET",
            "/metrics",
            "Metrics; those that name models need a key with the scope `metrics` or `admin`",
            TAG,
            _metrics,
            {200: Media("text/plain", "Prometheus text format.")},
            errors=(401, 403),
        ),
        _row("/openapi.json", "This document", openapi, Media("application/json", "OpenAPI 3.1.")),
        _row("/docs", "This document as a page", docs, Media("text/html", "A page without scripts.")),
    ]


def _row(path: str, summary: str, handler: Handler, answer: object) -> RouteSpec:
    return RouteSpec("GET", path, summary, TAG, handler, {200: answer})
