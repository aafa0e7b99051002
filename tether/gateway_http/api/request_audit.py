"""Writes audit entries of HTTP requests: access refusals, administrative actions, submitted jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tether.audit import NOBODY, Kind
from tether.crypto import SESSION_PREFIX
from tether.domain import api_key
from tether.errors import Forbidden, QuotaExceeded, RateLimited, TetherError, Unauthenticated
from tether.gateway_http.access.authentication import ANY_SCOPE, Caller
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.http.request import IncomingRequest

_KINDS = {
    "repository": Kind.MODEL,
    "keys": Kind.KEY,
    "tenants": Kind.TENANT,
    "models": Kind.MODEL,
    "jobs": Kind.JOB,
    "sessions": Kind.AUTH,
}
"""Kind by the first path segment after the version; every other action is administrative."""

_ACTS = ("admin", "models:write", "jobs", ANY_SCOPE)
"""Scopes of routes that act; inference is recorded where it happens."""

_FIELDS = ("id", "name", "version", "tenant", "scopes", "models", "isolated", "sealed", "weight", "quotas", "aliases")
"""Response fields that describe an action; none of them is secret."""


def actor(key: Caller | None) -> str:
    return NOBODY if key is None else f"key:{key.id}"


def refused(gateway: Gateway, error: TetherError, incoming: IncomingRequest, action: str) -> None:
    """Record a refused request; errors other than access decisions are ignored."""
    if isinstance(error, Unauthenticated):
        kind = Kind.AUTH
    elif isinstance(error, Forbidden | RateLimited | QuotaExceeded) or error.hidden:
        kind = Kind.ACCESS
    else:
        return
    shown, request_id = _presented(incoming)
    key_id = api_key.key_id(shown) or _of_session(gateway, shown)
    known = gateway.keys.find(key_id)
    record = None if kind is Kind.AUTH else known
    gateway.audit.count(
        kind,
        "" if record is None else record.tenant,
        actor=f"key:{key_id}" if key_id else NOBODY,
        action=action,
        outcome=Forbidden.code if error.hidden else error.code,
        address=incoming.peer.rpartition(":")[0],
        detail="" if kind is Kind.AUTH else error.message,
        request_id=request_id,
        by=NOBODY if known is None else "",
    )


def _of_session(gateway: Gateway, text: str) -> str:
    """Return the key id of a valid session token, else an empty string."""
    if not text.startswith(SESSION_PREFIX):
        return ""
    session = gateway.keys.sessions.known(hashlib.sha256(text.encode()).digest())
    return "" if session is None else session.key


def _presented(incoming: IncomingRequest) -> tuple[str, str]:
    """Return key text and request id of a request with possibly invalid headers."""
    key = request_id = ""
    for name, value in incoming.headers:
        if name == "x-api-key":
            key = value
        elif name == "authorization" and not key:
            key = value.partition(" ")[2].strip()
        elif name == "x-request-id":
            request_id = value
    return key, request_id


def acts(method: str, path: str, scope: str | None) -> bool:
    """Return True if a route is audited. Chunk uploads are not: the version made of them is."""
    return method not in ("GET", "HEAD") and scope in _ACTS and "/chunks" not in path


def act(
    gateway: Gateway,
    key: Caller | None,
    route: str,
    path: Mapping[str, Any],
    model: str,
    *,
    request_id: str,
    outcome: str,
    answer: Any,
) -> None:
    """Record the action of a key, successful or not. ``route`` is method and path; ``model`` is the
    platform's name of the model in the path."""
    parts = route.split("/")
    kind = _KINDS.get(parts[2].partition(":")[0], Kind.ADMIN) if len(parts) > 2 else Kind.ADMIN
    details = [f"{name}={value}" for name, value in path.items()]
    details += [f"{name}={value}" for name in _FIELDS if name not in path and (value := getattr(answer, name, None))]
    gateway.audit.record(
        kind,
        "" if key is None else key.tenant,
        actor=actor(key),
        action=route,
        outcome=outcome,
        model=model if kind is Kind.MODEL else "",
        job=str(path.get("id", ""))[:32] if kind is Kind.JOB else "",
        request_id=request_id,
        detail=" ".join(details),
    )


def submitted(
    gateway: Gateway, key: Caller, jobs: Sequence[Mapping[str, Any]], sizes: Sequence[int], request_id: str
) -> None:
    """Record jobs that were accepted, or found again by their idempotency key."""
    who = actor(key)
    for job, size in zip(jobs, sizes, strict=True):
        gateway.audit.record(
            Kind.JOB,
            key.tenant,
            actor=who,
            action="submit",
            model=job["model"],
            version=int(job["version"]),
            job=job["id"],
            request_id=request_id,
            bytes_in=size,
        )
