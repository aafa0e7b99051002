"""What a route is: who may call it, what it reads and what it answers; and the request that its handler gets."""

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
    """A body that is no JSON of a struct: its content type, and in one sentence what it is."""

    type: str
    description: str


@dataclass(frozen=True)
class Header:
    """A request header that a route reads."""

    name: str
    description: str


CLIENT_WAITS = Header("x-tether-timeout-s", "Seconds that the client still waits; nothing is done for it after that.")


@dataclass(frozen=True)
class RouteReply:
    """An answer: ``value`` is encoded as JSON unless it is bytes already."""

    value: Any
    status: int = 200
    content_type: str = JSON
    headers: Sequence[tuple[str, str]] = ()
    pack: bool = True
    """False: not compressed, whatever the client takes; for what does not get smaller."""


@dataclass(frozen=True)
class RequestContext:
    """One request, authenticated and parsed. ``body`` and ``query`` are of the row's types; ``key`` is None only on a
    route that needs none."""

    gateway: Gateway
    request: Request
    heading: RequestHeaders
    key: Caller | None
    body: Any
    query: Any
    named: list[str] = field(default_factory=list)
    """The platform's name of the model in the path, once it was asked for."""

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.tenant

    @property
    def caller(self) -> Caller:
        """Who called a route that needs a key."""
        if self.key is None:
            raise Unauthenticated("Invalid API key")
        return self.key

    @property
    def pool(self) -> str:
        """Whose workers answer this caller."""
        return self.gateway.tenants.pool(self.tenant)

    def path(self, name: str) -> str:
        return str(self.request.path_params.get(name, ""))

    def model(self, wanted: Right = Right.WRITE) -> str:
        """The platform's name of the model in the path, when the caller may do with it what takes ``wanted``.

        Raises:
            BadName: no model could have this name.
            ModelNotFound: it may not be used.
            Forbidden: it may be used, and belongs to another tenant.
        """
        name = self._named(self.caller.named)
        self.caller.check_model(name, wanted)
        return name

    def pushed_model(self) -> str:
        """The platform's name of the model that a push under the name in the path makes a version of.

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
        """How long the client still waits, as it said, but ``most_s`` seconds at most.

        Raises:
            InvalidRequest: what it said is no time.
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
    """One method of one path. Without a ``handler`` it is served by the hot path and only documented here.

    ``scope`` None means that no API key is needed, ANY_SCOPE that any will do. ``answers`` maps statuses to what they carry, ``errors`` are the
    error statuses beyond those that follow from the other columns. ``grows``: it stores something new, so it is refused while the
    broker has no room.
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
    """Its body may have up to ``max_body_bytes``, and is one of :mod:`tether.gateway_http.bodies.large_documents`; others have at most
    ``LARGE`` bytes."""
    binary: Media | None = None
    """A second form that the body may have; alone, it is streamed and not read for the handler."""
    query: type[msgspec.Struct] | None = None
    headers: Sequence[Header] = ()
    errors: Sequence[int] = ()
    grows: bool = False

    def statuses(self) -> list[int]:
        """Every error status the route can answer."""
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
