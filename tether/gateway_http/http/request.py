"""A request and its reply, independent of framework and server: headers, body with limits, compression."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from tether.domain.job import Parameter, new_request_id
from tether.errors import InvalidRequest, PayloadTooLarge, RequestTimeout

_COMPRESS_FROM = 512
"""Smaller bodies cost more to compress than to send."""

_COMPRESS_IN_THREAD, _DECOMPRESS_IN_THREAD = 32 << 10, 4 << 10
"""Sizes from which a body is compressed or decompressed in a thread: 1 MiB takes 30 ms; a small body may
inflate to a large one."""

_DECOMPRESS_STEP = 4 << 10
"""Bytes decompressed at a time. The rest of a step is copied after each gzip member, so steps are small."""

MANY_PARTS = 4096
SMALL_PART = 256
"""A body of more than ``MANY_PARTS`` parts with fewer bytes than this on average is rejected."""

Headers = list[tuple[str, str]]


class IncomingRequest(Protocol):
    """A request from a server interface; header names are in lower case."""

    @property
    def headers(self) -> Iterable[tuple[str, str]]: ...

    @property
    def peer(self) -> str:
        """Address and port of the client; empty if unknown."""

    async def read(self, limit: int, announced: int) -> bytes:
        """Return the body; ``announced`` is its Content-Length, 0 if there is none.

        Raises:
            PayloadTooLarge: it has more than ``limit`` bytes.
            InvalidRequest: the client disconnected before it was complete.
        """


class HttpReply(NamedTuple):
    """A complete reply."""

    status: int
    headers: Headers
    body: bytes


Handler = Callable[[IncomingRequest], Coroutine[Any, Any, HttpReply]]
"""Handles one request, errors included."""


class RequestHeaders:
    """The headers that the fast path uses, collected in one pass."""

    __slots__ = (
        "accept",
        "encoding",
        "idempotency_key",
        "json_length",
        "key",
        "length",
        "request_id",
        "sticky",
        "traceparent",
    )

    def __init__(self, headers: Iterable[tuple[str, str]]) -> None:
        self.json_length: int | None = None
        self.length = 0
        self.encoding = self.accept = self.key = ""
        self.request_id = self.traceparent = self.idempotency_key = self.sticky = ""
        for name, value in headers:
            if name in _USED:
                self._take(name, value)
        if not self.request_id:
            self.request_id = new_request_id()

    def _take(self, name: str, value: str) -> None:
        match name:
            case "x-api-key":
                self.key = value
            case "authorization":
                if not self.key and value[:7].lower() == "bearer ":
                    self.key = value[7:].strip()
            case "content-length":
                self.length = _number(value, "Content-Length")
            case "inference-header-content-length":
                self.json_length = _number(value, "Inference-Header-Content-Length")
            case "content-encoding":
                self.encoding = value.strip().lower()
            case "accept-encoding":
                self.accept = value.lower()
            case "x-request-id":
                self.request_id = clean_id(value)
            case "traceparent":
                self.traceparent = clean_id(value)
            case _:
                self._take_choice(name, value)

    def _take_choice(self, name: str, value: str) -> None:
        if name == "x-tether-sticky":
            self.sticky = value[:256]
        else:
            self.idempotency_key = _idempotency_key(value)


_USED = frozenset(
    {
        "x-api-key",
        "x-tether-sticky",
        "authorization",
        "content-length",
        "inference-header-content-length",
        "content-encoding",
        "accept-encoding",
        "x-request-id",
        "traceparent",
        "idempotency-key",
    }
)


def headers_with_id_only(headers: Iterable[tuple[str, str]]) -> RequestHeaders:
    """Return the request id alone, for a rejected request: its other headers may be the invalid ones."""
    return RequestHeaders([item for item in headers if item[0] == "x-request-id"])


def clean_id(value: str, *, limit: int = 128) -> str:
    """Return a client's id if it is short printable ASCII; else an empty string, so that a new one is
    generated."""
    return value if 0 < len(value) <= limit and value.isascii() and value.isprintable() else ""


def _idempotency_key(value: str) -> str:
    """Reject invalid keys: ignoring one would let a retry create a second job."""
    if value and not clean_id(value, limit=256):
        raise InvalidRequest("Idempotency-Key must be at most 256 printable ASCII characters", field="Idempotency-Key")
    return value


def _number(value: str, header: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 18:
        raise InvalidRequest(f"{header} must be a whole number", field=header.lower())
    return int(value)


class BodyReader(Protocol):
    """Reads a body within a timeout; see :class:`tether.gateway_http.http.body_deadline.BodyTimeouts`."""

    async def read(self, body: Awaitable[bytes]) -> bytes: ...


async def read_body(heading: RequestHeaders, incoming: IncomingRequest, limit: int, patience: BodyReader) -> bytes:
    """Return the whole body, decompressed.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes, before or after decompression, or too many small
            chunks.
        RequestTimeout: it was not complete in time.
        InvalidRequest: an unknown or broken encoding, or the client disconnected.
    """
    if heading.length > limit:
        raise too_large(limit)
    body = await patience.read(incoming.read(limit, heading.length))
    if heading.encoding in ("", "identity"):
        return body
    if len(body) < _DECOMPRESS_IN_THREAD:
        return _decompressed(body, heading.encoding, limit)
    return await asyncio.to_thread(_decompressed, body, heading.encoding, limit)


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """Decompress at most ``limit`` bytes, so that a zip bomb costs no more than a valid body."""
    if encoding not in ("gzip", "deflate"):
        shown = encoding[:32].encode("ascii", "backslashreplace").decode()
        raise InvalidRequest(
            f"Content-Encoding '{shown}' is not supported; use gzip or deflate", field="content-encoding"
        )
    chunks, left, place = [], limit + 1, 0
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        while place < len(body):
            if unpacker.eof:  # another member; only gzip has several (RFC 1952, section 2.2)
                unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            taken = body[place : place + _DECOMPRESS_STEP]
            chunks.append(unpacker.decompress(taken, left))
            left -= len(chunks[-1])
            if not left:
                raise too_large(limit)
            place += len(taken) - len(unpacker.unused_data)
    except zlib.error as error:
        which = f"the body from its byte {place} on" if place else "the body"
        raise InvalidRequest(
            f"{which} does not match its Content-Encoding; compress it accordingly, or omit that header",
            field="content-encoding",
        ) from error
    if not unpacker.eof:
        raise InvalidRequest("the compressed body is truncated; send all of it", field="content-encoding")
    return b"".join(chunks)


def too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit} bytes (setting max_body_bytes)", field="body")


def too_slow(seconds: float) -> RequestTimeout:
    return RequestTimeout(f"the body did not arrive within {seconds:g} s (setting body_timeout_s)", field="body")


def incomplete_body_error() -> InvalidRequest:
    return InvalidRequest(
        "the client disconnected, or its chunks were malformed, before the body was complete", field="body"
    )


class PartCounter:
    """Rejects a body of very many very small parts: each costs as much time as a large one."""

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts = 0
        self.size = 0

    def add(self, part: bytes) -> None:
        """Count one part.

        Raises:
            PayloadTooLarge: there are too many parts for their size.
        """
        self.parts += 1
        self.size += len(part)
        if self.parts > MANY_PARTS and self.size < self.parts * SMALL_PART:
            raise PayloadTooLarge(
                f"the body has more than {MANY_PARTS} chunks of less than {SMALL_PART} bytes on average; "
                "send larger chunks",
                field="body",
            )


def timeout_of(parameters: Mapping[str, Parameter], limit_s: float) -> float:
    """Return a request's timeout in seconds: ``limit_s``, or its parameter ``timeout`` (microseconds) if
    shorter.

    Raises:
        InvalidRequest: it is not a whole number.
    """
    asked = parameters.get("timeout", 0)
    if type(asked) is not int or asked < 0:
        raise InvalidRequest("parameters.timeout must be whole microseconds", field="parameters.timeout")
    return min(asked, int(limit_s * 1e6)) / 1e6 if asked else limit_s


def build_reply(
    status: int,
    body: bytes,
    heading: RequestHeaders,
    *,
    content_type: str,
    extra: Headers | None = None,
    pack: bool = True,
) -> HttpReply:
    """Build a reply, compressed if the client accepts it and the body is large enough; never without
    ``pack``."""
    headers: Headers = [("content-type", content_type), ("x-request-id", heading.request_id)]
    if extra:
        headers += extra
    if pack and heading.accept and len(body) >= _COMPRESS_FROM:
        body, encoding = _compressed(body, heading.accept)
        if encoding:
            headers.append(("content-encoding", encoding))
    return HttpReply(status, headers, body)


async def build_reply_async(
    status: int,
    body: bytes,
    heading: RequestHeaders,
    *,
    content_type: str,
    extra: Headers | None = None,
    pack: bool = True,
) -> HttpReply:
    """Build a reply as :func:`build_reply` does, but compress a large body in a thread."""
    if not pack or not heading.accept or len(body) < _COMPRESS_IN_THREAD:
        return build_reply(status, body, heading, content_type=content_type, extra=extra, pack=pack)
    return await asyncio.to_thread(build_reply, status, body, heading, content_type=content_type, extra=extra)


def _compressed(body: bytes, accept: str) -> tuple[bytes, str]:
    offered = {part.split(";")[0].strip() for part in accept.split(",") if "q=0" not in part.replace("q=0.", "")}
    if "gzip" in offered:
        return gzip.compress(body, 1), "gzip"
    if "deflate" in offered:
        return zlib.compress(body, 1), "deflate"
    return body, ""
