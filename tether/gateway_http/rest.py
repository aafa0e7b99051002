"""Everything but the hot path: the table of all routes, the framework's application, and CORS around both."""

from __future__ import annotations

from functools import cache

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from tether.gateway_http import (
    docs_page,
    openapi,
    rest_admin,
    rest_aliases,
    rest_audit,
    rest_chunks,
    rest_config,
    rest_grants,
    rest_jobs,
    rest_keys,
    rest_models,
    rest_oip,
    rest_ops,
    rest_repository,
    rest_rollout,
    rest_sessions,
    rest_shadows,
    rest_simple,
    rest_store,
    rest_tenants,
)
from tether.gateway_http.core import Gateway
from tether.gateway_http.paths import nowhere, routes
from tether.gateway_http.routing import Row
from tether.ops_http import App
from tether.settings import Settings

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_TOLD = (
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


def table() -> list[Row]:
    """Every route of the gateway, those of the hot path included."""

    @cache
    def document() -> bytes:
        return msgspec.json.encode(openapi.document(rows))

    @cache
    def page() -> bytes:
        return docs_page.page(openapi.document(rows)).encode()

    rows = [
        *rest_oip.ROWS,
        *rest_repository.ROWS,
        *rest_rollout.ROWS,
        *rest_simple.ROWS,
        *rest_jobs.ROWS,
        *rest_models.ROWS,
        *rest_aliases.ROWS,
        *rest_shadows.ROWS,
        *rest_config.ROWS,
        *rest_grants.ROWS,
        *rest_sessions.ROWS,
        *rest_audit.ROWS,
        *rest_chunks.ROWS,
        *rest_store.ROWS,
        *rest_tenants.ROWS,
        *rest_keys.ROWS,
        *rest_admin.ROWS,
        *rest_ops.rows(document, page),
    ]
    return rows


def build(gateway: Gateway) -> Starlette:
    """The application that serves what the hot path does not."""
    app = Starlette(routes=routes(gateway, table()))
    app.router.redirect_slashes = False
    app.router.default = nowhere
    return app


def with_cors(app: App, settings: Settings) -> App:
    """``app``, open to the origins of ``settings.cors_origins``; as it is when there are none."""
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not origins:
        return app
    allowed: App = CORSMiddleware(
        app, allow_origins=origins, allow_methods=_METHODS, allow_headers=["*"], expose_headers=_TOLD, max_age=600
    )
    return allowed
