"""HTTP as bytes on a socket: what no client library would send."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Raw:
    """What came back. ``closed``: the server ended the connection within the time that was given."""

    data: bytes
    closed: bool

    @property
    def status(self) -> int:
        """0 when nothing that looks like an answer came."""
        head = self.data.split(b" ", 2)
        return int(head[1]) if len(head) > 2 and head[0].startswith(b"HTTP/1") else 0

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def code(self) -> str:
        return str(self.json().get("code", ""))

    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


@contextlib.contextmanager
def connected(url: str, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout_s) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield made


def exchange(url: str, sent: bytes | Iterable[bytes], *, timeout_s: float = 10.0, half_close: bool = False) -> Raw:
    """Send bytes, stop early when the server hangs up, and collect what comes until it closes or time is over."""
    with connected(url, timeout_s) as made:
        # A server that refuses early closes while we still send.
        with contextlib.suppress(ConnectionError, TimeoutError):
            for part in [sent] if isinstance(sent, bytes) else sent:
                made.sendall(part)
            if half_close:
                made.shutdown(socket.SHUT_WR)
        return receive(made)


def receive(made: socket.socket) -> Raw:
    found = bytearray()
    try:
        while part := made.recv(65536):
            found += part
    except TimeoutError:
        return Raw(bytes(found), closed=False)
    except ConnectionError:
        pass
    return Raw(bytes(found), closed=True)


def request(line: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> bytes:
    """A request's bytes, exactly as given: nothing is added, but the connection is to be closed after it."""
    lines = [line, "host: test", "connection: close", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(parts: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
