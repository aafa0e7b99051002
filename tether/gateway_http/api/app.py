"""The complete HTTP interface: matches fast-path routes by hand and leaves all others to the framework."""

from __future__ import annotations

from tether.gateway_http.api import route_table
from tether.gateway_http.api.fast_path import FastPath
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http import rsgi
from tether.gateway_http.http.asgi import AsgiIncoming, send_reply
from tether.gateway_http.http.request import Handler
from tether.process.operations_server import App, Receive, Scope, Send
from tether.settings import Settings


def build(gateway: Gateway) -> rsgi.RsgiApp:
    """Return the application that Granian serves. With CORS, every request goes through the framework."""
    settings = gateway.settings
    if settings.cors_origins:
        return rsgi.entry(_no_fast_path, whole(gateway, settings), part_s=settings.body_timeout_s)
    return rsgi.entry(FastPath(gateway).find, route_table.build(gateway), part_s=settings.body_timeout_s)


def _no_fast_path(_method: str, _path: str) -> Handler | None:
    return None


def whole(gateway: Gateway, settings: Settings) -> App:
    """Return all routes as one ASGI application, open to the CORS origins of ``settings``."""
    hot, cold = FastPath(gateway), route_table.build(gateway)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        handler = hot.find(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await cold(scope, receive, send)
        else:
            await send_reply(send, await handler(AsgiIncoming(scope, receive)))

    return route_table.with_cors(app, settings)
