"""Requests and replies over ASGI, for the framework's routes."""

from __future__ import annotations

from tether.gateway_http.http.request import Headers, HttpReply, incomplete_body_error, too_large
from tether.process.operations_server import Receive, Scope, Send


class AsgiIncoming:
    """See :class:`tether.gateway_http.http.request.IncomingRequest`."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._client = scope.get("client")
        self.headers: Headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    @property
    def peer(self) -> str:
        return "{}:{}".format(*self._client) if self._client else ""

    async def read(self, limit: int, announced: int) -> bytes:
        del announced
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise incomplete_body_error()
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > limit:
                raise too_large(limit)
            if not message.get("more_body"):
                return b"".join(parts)


async def send_reply(send: Send, answer: HttpReply) -> None:
    """Send a complete reply."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    headers.append((b"content-length", str(len(answer.body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
