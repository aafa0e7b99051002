"""The table of all routes, the framework's application, and CORS."""

from __future__ import annotations

from functools import cache

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from tether.gateway_http.api import docs_page, openapi
from tether.gateway_http.api.admin_routes import api_keys, audit, chunk_store, sessions, tenants
from tether.gateway_http.api.path_matching import nowhere, routes
from tether.gateway_http.api.route_spec import RouteSpec
from tether.gateway_http.api.routes import (
    aliases,
    chunks,
    grants,
    jobs,
    model_config,
    models,
    oip,
    operations,
    repository,
    rollout,
    shadows,
    simple_inference,
    workers,
)
from tether.gateway_http.gateway import Gateway
from tether.process.operations_server import App
from tether.settings import Settings

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_EXPOSED = (
    "x-request-id",
    "retry-after",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "location",
    "inference-header-content-length",
    "content-encoding",
    "x-tether-cache",
)


def table() -> list[RouteSpec]:
    """Return all routes of the gateway, including those of the fast path."""

    @cache
    def document() -> bytes:
        return msgspec.json.encode(openapi.document(rows))

    @cache
    def page() -> bytes:
        return docs_page.page(openapi.document(rows)).encode()

    rows = [
        *oip.ROWS,
        *repository.ROWS,
        *rollout.ROWS,
        *simple_inference.ROWS,
        *jobs.ROWS,
        *models.ROWS,
        *aliases.ROWS,
        *shadows.ROWS,
        *model_config.ROWS,
        *grants.ROWS,
        *sessions.ROWS,
        *audit.ROWS,
        *chunks.ROWS,
        *chunk_store.ROWS,
        *tenants.ROWS,
        *api_keys.ROWS,
        *workers.ROWS,
        *operations.rows(document, page),
    ]
    return rows


def build(gateway: Gateway) -> Starlette:
    """Return the application of all routes outside the fast path."""
    app = Starlette(routes=routes(gateway, table()))
    app.router.redirect_slashes = False
    app.router.default = nowhere
    return app


def with_cors(app: App, settings: Settings) -> App:
    """Return ``app`` with CORS for the origins in ``settings.cors_origins``; unchanged without any."""
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not origins:
        return app
    allowed: App = CORSMiddleware(
        app, allow_origins=origins, allow_methods=_METHODS, allow_headers=["*"], expose_headers=_EXPOSED, max_age=600
    )
    return allowed
