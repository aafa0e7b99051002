"""A raw ASGI request, read with limits: headers, body, compression. The hot path has no framework around it."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Mapping

from tether.errors import InvalidRequest, PayloadTooLarge
from tether.job import Parameter
from tether.ops_http import Receive, Send

_COMPRESS_FROM = 512
"""Smaller answers cost more to compress than to send."""

Headers = list[tuple[bytes, bytes]]


class Heading:
    """The headers the hot path looks at, collected in one pass."""

    __slots__ = ("accept", "encoding", "idempotency_key", "json_length", "length", "raw", "request_id", "traceparent")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw = headers
        self.json_length: int | None = None
        self.length = 0
        self.encoding = self.accept = b""
        self.request_id = self.traceparent = self.idempotency_key = ""
        for name, value in headers:
            if name == b"inference-header-content-length":
                self.json_length = _number(value, "Inference-Header-Content-Length")
            elif name == b"content-length":
                self.length = _number(value, "Content-Length")
            elif name == b"content-encoding":
                self.encoding = value.strip().lower()
            elif name == b"accept-encoding":
                self.accept = value.lower()
            elif name == b"x-request-id":
                self.request_id = clean_id(value)
            elif name == b"traceparent":
                self.traceparent = clean_id(value)
            elif name == b"idempotency-key":
                self.idempotency_key = clean_id(value, limit=256)
        if not self.request_id:
            self.request_id = os.urandom(8).hex()


def clean_id(value: bytes, *, limit: int = 128) -> str:
    """An id a client chose, when it is short printable ASCII; else nothing, and ours is used."""
    if 0 < len(value) <= limit and value.isascii() and (text := value.decode()).isprintable():
        return text
    return ""


def _number(value: bytes, header: str) -> int:
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(f"{header} must be a whole number", field=header.lower())
    return int(value)


async def read_body(heading: Heading, receive: Receive, limit: int) -> bytes:
    """The whole body, decompressed.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes, before or after decompression.
        InvalidRequest: an unknown or broken encoding, or the client left.
    """
    if heading.length > limit:
        raise _too_large(limit)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _rest(body, receive, limit)
    if len(body) > limit:
        raise _too_large(limit)
    if heading.encoding in (b"", b"identity"):
        return body
    return _decompressed(body, heading.encoding, limit)


async def _rest(first: bytes, receive: Receive, limit: int) -> bytes:
    parts, size = [first], len(first)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client left before the body was complete")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)


def _decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes are ever unpacked, so a bomb costs what an honest body costs."""
    if encoding not in (b"gzip", b"deflate"):
        shown = encoding[:32].decode("ascii", "backslashreplace")
        raise InvalidRequest(
            f"Content-Encoding '{shown}' is not supported; use gzip or deflate", field="content-encoding"
        )
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest("the body is not what its Content-Encoding says", field="content-encoding") from error
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacker.eof:
        raise InvalidRequest("the compressed body is cut short", field="content-encoding")
    return unpacked


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit} bytes (setting max_body_bytes)", field="body")


def timeout_of(parameters: Mapping[str, Parameter], limit_s: float) -> float:
    """Seconds a request may take: ``limit_s``, or less when its parameter ``timeout`` says so, in microseconds.

    Raises:
        InvalidRequest: it is not a whole number.
    """
    asked = parameters.get("timeout", 0)
    if type(asked) is not int or asked < 0:
        raise InvalidRequest("parameters.timeout must be whole microseconds", field="parameters.timeout")
    return min(limit_s, asked / 1e6) if asked else limit_s


async def respond(
    send: Send, status: int, body: bytes, heading: Heading, *, content_type: bytes, extra: Headers | None = None
) -> None:
    """Send an answer, compressed when the client asked for it and it pays."""
    headers: Headers = [(b"content-type", content_type), (b"x-request-id", heading.request_id.encode())]
    if extra:
        headers += extra
    if len(body) >= _COMPRESS_FROM and heading.accept:
        body, encoding = _compressed(body, heading.accept)
        if encoding:
            headers.append((b"content-encoding", encoding))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _compressed(body: bytes, accept: bytes) -> tuple[bytes, bytes]:
    offered = {part.split(b";")[0].strip() for part in accept.split(b",") if b"q=0" not in part.replace(b"q=0.", b"")}
    if b"gzip" in offered:
        return gzip.compress(body, 1), b"gzip"
    if b"deflate" in offered:
        return zlib.compress(body, 1), b"deflate"
    return body, b""
