"""HTTP server of every service: Granian in the service's own event loop, and the three operations routes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from tether.errors import ConfigError
from tether.process import metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Checks = Callable[[], dict[str, str]]
"""Health by dependency: ``ok`` or what is wrong."""


HEADER_BYTES = 64 << 10
"""Approximate limit of request line and headers (431 or 414 above); at most a hundred headers."""

BACKLOG = 1024


def bind(host: str, port: int) -> int:
    """Check that a port can be listened on; choose a free one if it is 0.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --ops-port or --http (0: a free one)"
            ) from error
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class HttpLimits:
    """Limits of connections. ``header_s``: header timeout, and idle timeout between requests."""

    connections: int = 256
    header_s: float = 30.0


@asynccontextmanager
async def listening(
    app: Any, host: str, port: int, *, interface: Interfaces = Interfaces.ASGINL, limits: HttpLimits = HttpLimits()
) -> AsyncIterator[int]:
    """Serve ``app``, an application of ``interface``, until the block ends; yield the port.

    HTTP/1.1 only: HTTP/2 is not needed, and its streams would bypass the limits.
    """
    port = bind(host, port)
    server = Server(
        app,
        address=host,
        port=port,
        interface=interface,
        log_enabled=False,
        websockets=False,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=int(limits.header_s * 1000), max_buffer_size=HEADER_BYTES),
        backlog=BACKLOG,
        backpressure=limits.connections,
    )
    task = asyncio.create_task(server.serve(), name="http")
    try:
        await _accepting(host, port, task)
        yield port
    finally:
        server.stop()
        await asyncio.gather(task, return_exceptions=True)


async def _accepting(host: str, port: int, task: asyncio.Task[None]) -> None:
    for _ in range(400):
        if task.done():
            break
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        writer.close()
        await writer.wait_closed()
        return
    raise ConfigError(f"the HTTP server did not start on {host}:{port}")


def operations(checks: Checks) -> App:
    """Return the app of ``/healthz`` (process runs), ``/readyz`` (dependencies) and ``/metrics``."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        status, content_type, body = answer(scope["path"], checks)
        await respond(send, status, content_type, body)

    return app


def answer(path: str, checks: Checks) -> tuple[int, str, bytes]:
    """Return status, content type and body of an operations route."""
    if path == "/metrics":
        metrics.dependencies(checks())
        body, content_type = metrics.exposition()
        return 200, content_type, body
    if path == "/healthz":
        return 200, "application/json", b'{"live":true}'
    if path == "/readyz":
        found = checks()
        ready = all(state == "ok" for state in found.values())
        return 200 if ready else 503, "application/json", json.dumps({"ready": ready, "checks": found}).encode()
    return 404, "application/json", b'{"error":"no such path","code":"not_found","request_id":""}'


async def respond(send: Send, status: int, content_type: str, body: bytes) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
