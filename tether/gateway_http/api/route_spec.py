"""A route's specification (access, request and response), and the request that its handler gets."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request

from tether.domain.model_names import check_platform_name
from tether.errors import InvalidRequest, Unauthenticated
from tether.gateway_http.access.authentication import Caller
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http.request import (
    RequestHeaders,
)
from tether.model.ownership import Right

JSON = "application/json"
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class Media:
    """A body that is not JSON of a struct: content type and a one-sentence description."""

    type: str
    description: str


@dataclass(frozen=True)
class Header:
    """A request header that a route reads."""

    name: str
    description: str


CLIENT_WAITS = Header("x-tether-timeout-s", "Seconds until the client's timeout; the request is dropped after that.")


@dataclass(frozen=True)
class RouteReply:
    """A response: ``value`` is encoded as JSON unless it is bytes."""

    value: Any
    status: int = 200
    content_type: str = JSON
    headers: Sequence[tuple[str, str]] = ()
    pack: bool = True
    """False: never compress, for content that does not shrink."""


@dataclass(frozen=True)
class RequestContext:
    """One authenticated and parsed request. ``body`` and ``query`` have the route's types; ``key`` is None
    only on a route without authentication."""

    gateway: Gateway
    request: Request
    heading: RequestHeaders
    key: Caller | None
    body: Any
    query: Any
    named: list[str] = field(default_factory=list)
    """The platform's name of the model in the path, once requested."""

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.tenant

    @property
    def caller(self) -> Caller:
        """The caller of a route that needs a key."""
        if self.key is None:
            raise Unauthenticated("Invalid API key")
        return self.key

    @property
    def pool(self) -> str:
        """Pool whose workers answer this caller."""
        return self.gateway.tenants.pool(self.tenant)

    def path(self, name: str) -> str:
        return str(self.request.path_params.get(name, ""))

    def model(self, wanted: Right = Right.WRITE) -> str:
        """Return the platform's name of the model in the path, if the caller has the right ``wanted`` to it.

        Raises:
            BadName: no model can have this name.
            ModelNotFound: the caller may not use it.
            Forbidden: the caller may use it, but it belongs to another tenant.
        """
        name = self._named(self.caller.named)
        self.caller.check_model(name, wanted)
        return name

    def pushed_model(self) -> str:
        """Return the platform's name of the model that a push under the name in the path adds a version to.

        Raises:
            Conflict: the name is another tenant's.
            BadName, ModelNotFound, Forbidden
        """
        name = self._named(self.caller.named_push)
        self.caller.check_push(name)
        return name

    def _named(self, read: Callable[[str], str]) -> str:
        if not self.named:
            field_name = "name" if "name" in self.request.path_params else "model"
            self.named.append(check_platform_name(read(self.path(field_name)), field=field_name))
        return self.named[0]

    def waits(self, most_s: float) -> float:
        """Return the client's remaining wait in seconds, ``most_s`` at most.

        Raises:
            InvalidRequest: the header is not a positive number.
        """
        text = self.request.headers.get(CLIENT_WAITS.name)
        if text is None:
            return most_s
        try:
            given = float(text)
        except ValueError:
            given = 0.0
        if not 0 < given < math.inf:
            raise InvalidRequest(f"{CLIENT_WAITS.name} must be a number of seconds above 0", field=CLIENT_WAITS.name)
        return min(given, most_s)


Handler = Callable[[RequestContext], Awaitable[RouteReply]]


@dataclass(frozen=True)
class RouteSpec:
    """One method of one path. Without a ``handler`` the fast path serves it, and it is only documented here.

    ``scope`` None means no API key, ANY_SCOPE any valid key. ``answers`` maps statuses to response types;
    ``errors`` are error statuses beyond those implied by the other fields. ``grows``: it stores something
    new, so it is rejected while the broker is full.
    """

    method: str
    path: str
    summary: str
    tag: str
    handler: Handler | None
    answers: Mapping[int, Any]
    scope: str | None = None
    body: Any = None
    body_optional: bool = False
    large: bool = False
    """Its body may have up to ``max_body_bytes`` and is one of
    :mod:`tether.gateway_http.bodies.large_documents`; other bodies have at most ``LARGE`` bytes."""
    binary: Media | None = None
    """An alternative form of the body; without ``body``, it is streamed instead of read for the handler."""
    query: type[msgspec.Struct] | None = None
    headers: Sequence[Header] = ()
    errors: Sequence[int] = ()
    grows: bool = False

    def statuses(self) -> list[int]:
        """Return all error statuses of the route."""
        found = {500, *self.errors}
        if self.scope is not None:
            found |= {401, 403, 429}
        if self.body is not None or self.binary is not None:
            found |= {400, 408, 413}
        if self.query is not None or "{" in self.path:
            found.add(400)
        if self.grows:
            found.add(503)
        return sorted(found - set(self.answers))
