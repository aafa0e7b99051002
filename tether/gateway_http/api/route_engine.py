"""Handles requests of a path by its :class:`RouteSpec`: authenticate, read the body, call the handler, audit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from tether.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, TetherError
from tether.gateway_http.access.rate_limits import LimitPermit
from tether.gateway_http.api import log_text, request_audit
from tether.gateway_http.api.route_spec import CLIENT_WAITS, JSON, Handler, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.bodies.large_bodies import LARGE
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http.asgi import AsgiIncoming, send_reply
from tether.gateway_http.http.error_responses import error_response
from tether.gateway_http.http.request import (
    Headers,
    IncomingRequest,
    RequestHeaders,
    build_reply,
    build_reply_async,
    headers_with_id_only,
    read_body,
)
from tether.process import metrics
from tether.process.operations_server import Receive, Scope, Send
from tether.wire import oip_json

_encode = msgspec.json.Encoder().encode


@dataclass
class _RequestState:
    """Progress of a request, for its error reply."""

    heading: RequestHeaders
    status: int = 500
    sent: bool = False
    ticket: LimitPermit | None = None
    call: RequestContext | None = None
    """Set once the request is authenticated and parsed."""

    def told(self, error: TetherError) -> str:
        """Return an error's message as its caller should read it."""
        key = None if self.call is None else self.call.key
        return error.message if key is None else key.told(error.message)

    def limits(self) -> Headers:
        """Return the rate-limit headers of its key, if it has limits."""
        return [] if self.ticket is None else self.ticket.headers()


class Endpoint:
    """All methods of one path, as an ASGI application."""

    def __init__(self, gateway: Gateway, rows: Sequence[RouteSpec]) -> None:
        self._gateway = gateway
        self._path = rows[0].path
        self._rows = {row.method: (row, row.handler) for row in rows if row.handler is not None}
        if "GET" in self._rows:
            self._rows["HEAD"] = self._rows["GET"]
        self._allow = ", ".join(sorted({row.method for row in rows} | set(self._rows) | {"OPTIONS"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = AsgiIncoming(scope, receive)
        seen = _RequestState(headers_with_id_only(incoming.headers))

        async def noting(message: Any) -> None:
            seen.sent = True
            await send(message)

        try:
            await self._answer(seen, incoming, scope, receive, noting)
        except TetherError as error:
            error = self._gateway.storage.explained(
                error
            )  # rebind: another name would outlive this block and keep the request in memory
            request_audit.refused(self._gateway, error, incoming, self._route(scope))
            self._audit(seen, scope, error.code, None)
            seen.status = await send_error(error, seen.heading, send, extra=seen.limits(), message=seen.told(error))
        except ClientDisconnect:
            seen.status = 499
        except Exception as error:
            caller = None if seen.call is None else seen.call.key
            log_text.failed(error, seen.heading.request_id, sealed=log_text.sealed(self._gateway, caller))
            seen.status = 500
            if seen.sent:
                raise
            await send_error(TetherError("internal error of the gateway; see its log"), seen.heading, send)
        finally:
            if seen.ticket is not None:
                seen.ticket.leave()
        metrics.HTTP_REQUESTS.labels(self._path, str(seen.status)).inc()

    async def _answer(
        self, seen: _RequestState, incoming: IncomingRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        method = scope["method"]
        found = self._rows.get(method)
        if found is None:
            seen.status = await self._without_row(method, seen.heading, send)
            return
        row, handler = found
        seen.call = call = await self._call(row, seen, incoming, Request(scope, receive))
        given = await (_in_time(handler, call) if CLIENT_WAITS in row.headers else handler(call))
        if self._audit(seen, scope, "ok", given.value):
            await self._gateway.audit.settled()
        content = given.value if isinstance(given.value, bytes) else _encode(given.value)
        extra = [*given.headers, ("x-content-type-options", "nosniff"), *seen.limits()]
        heading, kind = seen.heading, given.content_type
        whole = await build_reply_async(given.status, content, heading, content_type=kind, extra=extra, pack=given.pack)
        await send_reply(send, whole)
        seen.status = given.status

    def _route(self, scope: Scope) -> str:
        return f"{scope['method']} {self._path}"

    def _audit(self, seen: _RequestState, scope: Scope, outcome: str, answer: Any) -> bool:
        """Record the request if it is an audited action; return True if so."""
        found, call = self._rows.get(scope["method"]), seen.call
        if found is None or call is None or not request_audit.acts(scope["method"], self._path, found[0].scope):
            return False
        path, request_id = dict(call.request.path_params), seen.heading.request_id
        model = call.named[0] if call.named else str(path.get("name") or path.get("model", ""))
        request_audit.act(
            self._gateway,
            call.key,
            self._route(scope),
            path,
            model,
            request_id=request_id,
            outcome=outcome,
            answer=answer,
        )
        return True

    async def _without_row(self, method: str, heading: RequestHeaders, send: Send) -> int:
        allow = ("allow", self._allow)
        if method == "OPTIONS":
            headers = [(b"allow", self._allow.encode()), (b"x-request-id", heading.request_id.encode())]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return 204
        error = InvalidRequest(f"{method[:32]} is not allowed here; allowed: {self._allow}", field="method")
        return await send_error(error, heading, send, status=405, extra=[allow])

    async def _call(
        self, row: RouteSpec, seen: _RequestState, incoming: IncomingRequest, request: Request
    ) -> RequestContext:
        gateway = self._gateway
        seen.heading = heading = RequestHeaders(incoming.headers)
        key = None
        if row.scope is not None:
            key = await gateway.authenticated(heading, row.scope)
            seen.ticket = gateway.limits.enter(key.key)
        if row.grows:
            gateway.storage.require()
        query = None if row.query is None else read_query(request.query_params.multi_items(), row.query)
        body = None
        if row.body is not None:
            body = await self._body(row, heading, incoming, "" if key is None else key.tenant)
        return RequestContext(gateway, request, heading, key, body, query)

    async def _body(self, row: RouteSpec, heading: RequestHeaders, incoming: IncomingRequest, tenant: str) -> Any:
        """Read a small body in the event loop, a large one in the body process."""
        gateway, most = self._gateway, self._gateway.settings.max_body_bytes
        if row.large:
            content = await read_body(heading, incoming, most, gateway.body_timeouts)
            return await gateway.large_bodies.document(tenant, row.body.__name__, content)
        try:
            content = await read_body(heading, incoming, min(most, LARGE), gateway.body_timeouts)
        except PayloadTooLarge as error:
            if most <= LARGE:
                raise
            words = f"the body is larger than {LARGE} bytes, the limit of {row.method} {row.path}"
            raise PayloadTooLarge(words, field=error.field) from None
        return row.body() if row.body_optional and not content else oip_json.parse_body(_decoder(row.body), content)


_LONGEST_S = 86400.0


async def _in_time(handler: Handler, call: RequestContext) -> RouteReply:
    """Run the handler within the client's timeout."""
    seconds = call.waits(_LONGEST_S)
    try:
        async with asyncio.timeout(seconds) as limit:
            return await handler(call)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"no reply within the client's timeout of {seconds:g} s (header x-tether-timeout-s)"
        ) from error


@lru_cache(maxsize=64)
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def read_query(items: Iterable[tuple[str, str]], kind: type[msgspec.Struct]) -> msgspec.Struct:
    """Return query parameters as a struct.

    Raises:
        InvalidRequest: naming a parameter that is unknown, repeated or invalid.
    """
    known = {item.encode_name for item in msgspec.structs.fields(kind)}
    found: dict[str, str] = {}
    for name, value in items:
        shown = name[:64]
        if name not in known:
            raise InvalidRequest(
                f"unknown query parameter {shown!r}; expected one of: {', '.join(sorted(known))}", field=shown
            )
        if name in found:
            raise InvalidRequest(f"query parameter '{name}' is given more than once", field=name)
        found[name] = value
    try:
        return msgspec.convert(found, kind, strict=False)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        name = path.strip("`").removeprefix("$.")[:64]
        raise InvalidRequest(f"query parameter '{name}' is invalid: {reason[:300]}", field=name) from error


async def send_error(
    error: TetherError,
    heading: RequestHeaders,
    send: Send,
    *,
    status: int | None = None,
    extra: Headers | None = None,
    message: str | None = None,
) -> int:
    """Send an error reply; ``status`` and ``message`` override the error's own."""
    own, headers, body = error_response(error, heading.request_id, message)
    status = own if status is None else status
    await send_reply(send, build_reply(status, body, heading, content_type=JSON, extra=[*headers, *(extra or [])]))
    return status
