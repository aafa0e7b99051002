"""The ASGI entry: hot routes are recognised by hand, everything else goes to the framework."""

from __future__ import annotations

from tether.gateway_http import rest
from tether.gateway_http.core import Gateway
from tether.gateway_http.hot import HotRoutes
from tether.ops_http import App, Receive, Scope, Send


def build(gateway: Gateway) -> App:
    """The whole HTTP interface of one gateway."""
    hot = HotRoutes(gateway)
    cold = rest.build(gateway)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            if path.startswith("/v2/models/") and path.endswith("/infer"):
                parts = path.split("/")
                if len(parts) == 5:
                    await hot.infer(parts[3], "", scope, receive, send)
                    return
                if len(parts) == 7 and parts[4] == "versions":
                    await hot.infer(parts[3], parts[5], scope, receive, send)
                    return
            elif path == "/v1/jobs":
                await hot.submit(scope, receive, send)
                return
            elif path == "/v1/jobs:batch":
                await hot.submit_many(scope, receive, send)
                return
        await cold(scope, receive, send)

    return rest.with_cors(app, gateway.settings)
