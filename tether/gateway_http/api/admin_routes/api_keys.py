"""API keys: create, list, revoke, rotate."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from tether.domain import api_key
from tether.domain.tenant import check_tenant_name
from tether.errors import Conflict, NotFound
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import admin as bodies

TAG = "Administration"


async def _create(call: RequestContext) -> RouteReply:
    wanted: bodies.NewKey = call.body
    tenant = check_tenant_name(wanted.tenant, field="tenant")
    call.gateway.tenants.require_unused(tenant)
    text = api_key.new_key_text()
    scopes = tuple(scope for scope in api_key.SCOPES if scope in wanted.scopes)
    now = call.gateway.bus.clock.utc()
    record = msgspec.structs.replace(
        api_key.stored_key(text, tenant=tenant, scopes=scopes, name=wanted.name, created_at=now),
        models=call.caller.bound(
            None if isinstance(wanted.models, msgspec.UnsetType) else tuple(wanted.models), tenant
        ),
        rate=wanted.rate,
        burst=wanted.burst,
        concurrency=wanted.concurrency,
        expires_at=now + wanted.expires_s if wanted.expires_s else 0.0,
    )
    await call.gateway.keys.store(record)
    return RouteReply(bodies.CreatedKey(key=text, **_fields(record)), 201)


async def _list(call: RequestContext) -> RouteReply:
    keys = call.gateway.keys
    used = await keys.uses.last()
    return RouteReply(bodies.Keys([bodies.Key(**_fields(record, used.get(record.id, 0.0))) for record in keys.known()]))


def _found(call: RequestContext) -> api_key.ApiKey:
    key_id = call.path("id")
    record = call.gateway.keys.find(key_id)
    if record is None:
        raise NotFound(f"there is no API key '{key_id[:64]}'", field="id")
    return record


async def _revoke(call: RequestContext) -> RouteReply:
    record = _found(call)
    if record.id == call.caller.id:
        raise Conflict("a key cannot revoke itself; use another admin key", field="id")
    return RouteReply(bodies.Key(**_fields(await call.gateway.keys.revoke(record))))


async def _rotate(call: RequestContext) -> RouteReply:
    """Store the new key before the old one's expiry, so that a failure in between leaves both valid."""
    keys, record, now = call.gateway.keys, _found(call), call.gateway.bus.clock.utc()
    if not record.counts(now):
        raise Conflict(f"API key '{record.id}' is revoked or expired; create a new one", field="id")
    call.caller.bound(record.models, record.tenant)
    text = api_key.new_key_text()
    successor = api_key.rotated(record, text, now)
    await keys.store(successor)
    end = now + call.body.grace_s
    ending = min(record.expires_at, end) if record.expires_at else end
    await keys.store(msgspec.structs.replace(record, expires_at=ending))
    return RouteReply(bodies.CreatedKey(key=text, **_fields(successor)), 201)


def _fields(record: api_key.ApiKey, used_at: float = 0.0) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "scopes": list(record.scopes),
        "name": record.name,
        "created_at": rfc3339(record.created_at),
        "revoked": record.revoked,
        "models": list(record.models),
        "rate": record.rate,
        "burst": record.burst,
        "concurrency": record.concurrency,
        "expires_at": rfc3339(record.expires_at) if record.expires_at else UNSET,
        "last_used_at": rfc3339(used_at) if used_at else UNSET,
        "replaces": record.replaces or UNSET,
    }


ROWS = [
    RouteSpec(
        "POST",
        "/v1/keys",
        "Create an API key",
        TAG,
        _create,
        {201: bodies.CreatedKey},
        "admin",
        body=bodies.NewKey,
        grows=True,
    ),
    RouteSpec("GET", "/v1/keys", "List API keys", TAG, _list, {200: bodies.Keys}, "admin", errors=(503,)),
    RouteSpec(
        "DELETE",
        "/v1/keys/{id}",
        "Revoke an API key",
        TAG,
        _revoke,
        {200: bodies.Key},
        "admin",
        errors=(404, 409, 503),
    ),
    RouteSpec(
        "POST",
        "/v1/keys/{id}/rotate",
        "Create a key that replaces another",
        TAG,
        _rotate,
        {201: bodies.CreatedKey},
        "admin",
        body=bodies.Rotation,
        body_optional=True,
        errors=(404, 409),
        grows=True,
    ),
]
