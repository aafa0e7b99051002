"""The route table as routes of the framework, and the reply for unknown paths."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.routing import Route

from tether.domain.model_names import RESERVED
from tether.errors import NotFound
from tether.gateway_http.api.route_engine import Endpoint, send_error
from tether.gateway_http.api.route_spec import RouteSpec
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http.asgi import AsgiIncoming
from tether.gateway_http.http.request import headers_with_id_only
from tether.process import metrics
from tether.process.operations_server import Receive, Scope, Send


async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """Reply to a path that matches no route."""
    shown = scope["path"][:200].encode("ascii", "backslashreplace").decode()
    heading = headers_with_id_only(AsgiIncoming(scope, receive).headers)
    status = await send_error(
        NotFound(f"no route matches '{shown}'; see /docs for all routes", field="path"), heading, send
    )
    metrics.HTTP_REQUESTS.labels("none", str(status)).inc()


class _ModelName(StringConvertor):
    """A model in a path: ``model``, or ``tenant%2Fmodel``, which the HTTP server decodes to ``tenant/model``."""

    regex = rf"[^/]+(?:/(?!(?:{'|'.join(map(re.escape, sorted(RESERVED)))})(?:/|$))[^/:]+)?"


register_url_convertor("model", _ModelName())


def routes(gateway: Gateway, rows: Sequence[RouteSpec]) -> list[Route]:
    """Return a table's Starlette routes: one per path, in the order of the table."""
    by_path: dict[str, list[RouteSpec]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    return [Route(_MODEL.sub(r"{\1:model}", path), Endpoint(gateway, group)) for path, group in by_path.items()]


_MODEL = re.compile(r"\{(model|name)\}")
