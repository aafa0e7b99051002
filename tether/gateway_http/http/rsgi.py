"""The gateway's entry point over RSGI, Granian's own interface: one call for a body, one call for a reply.

Fast-path routes are handled here. All others go to the ASGI application through :func:`bridge`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from granian.rsgi import ProtocolClosed

from tether.errors import InvalidRequest, PayloadTooLarge, TetherError
from tether.gateway_http.http.disconnects import client_gone
from tether.gateway_http.http.error_responses import error_response
from tether.gateway_http.http.request import Handler, Headers, PartCounter, incomplete_body_error, too_large, too_slow
from tether.process.operations_server import App

log = logging.getLogger(__name__)


class RsgiHeaders(Protocol):
    def items(self) -> Headers: ...


class RsgiScope(Protocol):
    """The parts of Granian's scope in use; ``path`` is decoded, ``query_string`` is not."""

    proto: str
    method: str
    path: str
    query_string: str
    scheme: str
    http_version: str
    client: str
    server: str
    headers: RsgiHeaders


class RsgiTransport(Protocol):
    async def send_bytes(self, data: bytes) -> None: ...


class RsgiProtocol(Protocol):
    """Granian's side of one request."""

    async def __call__(self) -> bytes: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None: ...

    def response_stream(self, status: int, headers: Headers) -> RsgiTransport: ...

    def client_disconnect(self) -> Awaitable[None]: ...


_REFUSED = 400

_DRAIN_BYTES = 8_000_000
_DRAIN_S = 1.0
"""Limits of reading the rest of an unwanted body: enough for its sender to read the reply."""

RsgiApp = Callable[[RsgiScope, RsgiProtocol], Awaitable[None]]


class RsgiIncoming:
    """See :class:`tether.gateway_http.http.request.IncomingRequest`."""

    __slots__ = ("_body", "_protocol", "_scope", "headers")

    def __init__(self, scope: RsgiScope, protocol: RsgiProtocol) -> None:
        self._protocol = protocol
        self._scope = scope
        self.headers = scope.headers.items()
        self._body: AsyncIterator[bytes] | None = body_parts(protocol)

    @property
    def peer(self) -> str:
        return self._scope.client

    async def read(self, limit: int, announced: int) -> bytes:
        """Read a body of known length in one call; otherwise read its parts and enforce ``limit``."""
        if announced:
            self._body = None
            try:
                return await self._protocol()
            except ProtocolClosed as error:
                raise incomplete_body_error() from error
        parts, counter = [], PartCounter()
        body = self._body or body_parts(self._protocol)
        async for part in body:
            parts.append(part)
            counter.add(part)
            if counter.size > limit:
                raise too_large(limit)
        self._body = None
        return b"".join(parts)

    async def drain_or_close(self, answer: Headers) -> None:
        """See :func:`_drain_or_close`."""
        if self._body is not None:
            await _drain_or_close(self.headers, self._body, answer)


async def body_parts(protocol: RsgiProtocol) -> AsyncIterator[bytes]:
    """Yield the parts of a body as they arrive.

    Raises:
        InvalidRequest: it ended early. Granian signals this only by a second empty part after the one
            that ends every
            body; trailers look the same and are rejected too.
    """
    ended = False
    async for part in protocol:
        if ended:
            raise incomplete_body_error()
        ended = not part
        yield part


def entry(route: Callable[[str, str], Handler | None], cold: App, *, part_s: float) -> RsgiApp:
    """Return an RSGI application: ``route`` finds fast-path handlers, ``cold`` handles all other requests.

    ``cold`` waits ``part_s`` seconds for each part of a body.
    """

    async def app(scope: RsgiScope, protocol: RsgiProtocol) -> None:
        client_gone.set(protocol.client_disconnect)
        handler = route(scope.method, scope.path)
        if handler is None:
            await bridge(cold, scope, protocol, part_s)
            return
        incoming = RsgiIncoming(scope, protocol)
        answer = await handler(incoming)
        if answer.status >= _REFUSED:
            await incoming.drain_or_close(answer.headers)
        protocol.response_bytes(answer.status, answer.headers, answer.body)

    return app


async def _drain_or_close(asked: Headers, body: AsyncIterator[bytes], answer: Headers) -> None:
    """Drain an unread body before its reply, or close the connection with the reply.

    A client that is still sending would not read the reply, and one that reuses the connection would lose its
    next request. A short rest is read; a longer one closes the connection. A client that sent ``Expect``
    sends no body.
    """
    sent = {name.lower(): value for name, value in asked}
    if "transfer-encoding" not in sent and sent.get("content-length", "0") == "0":
        return
    length = sent.get("content-length", "")
    if "expect" not in sent and len(length) <= len(str(_DRAIN_BYTES)) and await _drain(body):
        return
    answer.append(("connection", "close"))


async def _drain(body: AsyncIterator[bytes]) -> bool:
    """Read and discard the rest of a body; return False if it exceeds the limits."""
    counter = PartCounter()
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for part in body:
                counter.add(part)
                if counter.size > _DRAIN_BYTES:
                    return False
    except (TimeoutError, InvalidRequest, PayloadTooLarge, ProtocolClosed):
        return False
    return True


class _Bridge:
    """Carries one request through an ASGI application."""

    def __init__(self, asked: Headers, protocol: RsgiProtocol, part_s: float) -> None:
        self._asked = asked
        self._protocol = protocol
        self._part_s = part_s
        self._body = body_parts(protocol)
        self._counter = PartCounter()
        self._read = False
        self._status = 0
        self._headers: Headers = []
        self._transport: RsgiTransport | None = None
        self.answered = False

    async def receive(self) -> dict[str, Any]:
        if self._read:
            await self._protocol.client_disconnect()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(self._part_s):
                part = await anext(self._body)
        except StopAsyncIteration:
            self._read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        except TimeoutError as error:
            raise too_slow(self._part_s) from error
        self._counter.add(part)
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            if not self._read and self._status >= _REFUSED:
                self._read = True
                await _drain_or_close(self._asked, self._body, self._headers)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self.answered = True
        if self._transport is None and not more:
            self._protocol.response_bytes(self._status, self._headers, body)
            return
        if self._transport is None:
            self._transport = self._protocol.response_stream(self._status, self._headers)
        await self._transport.send_bytes(body)


async def bridge(app: App, scope: RsgiScope, protocol: RsgiProtocol, part_s: float) -> None:
    """Run an ASGI application (asgi.readthedocs.io, HTTP 2.4) for one RSGI request."""
    crossing = _Bridge(scope.headers.items(), protocol, part_s)
    try:
        await app(_asgi_scope(scope), crossing.receive, crossing.send)
    except Exception:
        log.exception("request failed unexpectedly", extra={"action": "request_failed"})
        if not crossing.answered:
            status, headers, body = error_response(TetherError("internal error of the gateway; see its log"), "")
            protocol.response_bytes(status, headers, body)


def _asgi_scope(scope: RsgiScope) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": scope.http_version,
        "method": scope.method,
        "scheme": scope.scheme,
        "path": scope.path,
        "raw_path": scope.path.encode(),
        "query_string": scope.query_string.encode(),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in scope.headers.items()],
        "client": _address(scope.client),
        "server": _address(scope.server),
    }


def _address(text: str) -> tuple[str, int] | None:
    host, _, port = text.rpartition(":")
    return (host, int(port)) if port.isdecimal() else None
