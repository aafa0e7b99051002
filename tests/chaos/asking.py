"""HTTP over raw asyncio protocols: a client that costs little of the machine that it shares with the platform."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from bench.load import HEAD_END, content_length

GONE = 0
"""The status of a request whose connection was lost."""


class Answer(NamedTuple):
    """``seconds`` from the moment the request was written until the answer was whole."""

    status: int
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def told(self) -> str:
        """The status, and the code of an error."""
        if 200 <= self.status < 300:
            return str(self.status)
        try:
            return f"{self.status} {self.json().get('code', '')}".strip()
        except (ValueError, AttributeError):
            return str(self.status)


class Connection(asyncio.Protocol):
    """One request at a time; an answer that is not wanted ends it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._sent = 0.0
        self._answer: asyncio.Future[Answer] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports are none of asyncio's classes

    def ask(self, content: bytes) -> asyncio.Future[Answer]:
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer, self._sent = b"", time.perf_counter()
        if self.transport is None:
            self._ended(GONE, b"")
        else:
            self.transport.write(content)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        head_end = self._buffer.find(HEAD_END)
        if head_end == -1:
            return
        length = content_length(self._buffer[:head_end])
        if len(self._buffer) >= head_end + 4 + max(length, 0):
            self._ended(int(self._buffer[9:12]), self._buffer[head_end + 4 :])

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._ended(GONE, str(exc).encode())

    def _ended(self, status: int, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(status, body, time.perf_counter() - self._sent))

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Asker:
    """A client with an API key; it opens another connection whenever all that it has are in use."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self._key = key
        self._free: list[Connection] = []

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """The bytes of a request; a ``body`` that is no bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields: Mapping[str, str] = {
            "host": f"{self.host}:{self.port}",
            "x-api-key": self._key,
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
            "content-length": str(len(content)),
        }
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return head.encode("latin-1") + b"\r\n" + content

    async def connected(self) -> Connection:
        """A connection that is in use by nobody; the caller gives it back or closes it.

        Raises:
            OSError: it cannot be made.
        """
        while self._free:
            connection = self._free.pop()
            if connection.transport is not None:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        return made

    async def send(self, content: bytes) -> Answer:
        """Send a request and wait for its answer; who is cancelled meanwhile leaves the connection."""
        try:
            connection = await self.connected()
        except OSError as error:
            return Answer(GONE, str(error).encode(), 0.0)
        try:
            answer = await connection.ask(content)
        except asyncio.CancelledError:
            connection.close()
            raise
        if answer.status != GONE:
            self._free.append(connection)
        return answer

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return await self.send(self.request(method, path, body, **headers))

    def close(self) -> None:
        while self._free:
            self._free.pop().close()
