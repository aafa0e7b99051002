"""Model ownership and grants to other tenants."""

from __future__ import annotations

from typing import Any

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import Change, ChangeRequest
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.model_config import wait_until_seen
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.schemas import models
from tether.model.ownership import Ownership, Right
from tether.wire import codec


async def _request_change(call: RequestContext, change: Change, **fields: Any) -> RouteReply:
    """Send a change to the model store, and wait until this gateway sees it."""
    name = call.model(Right.OWN)
    bus = call.gateway.bus
    request = ChangeRequest(change, name, **call.caller.asker._asdict(), **fields)
    answer = await ask_owner(
        bus,
        "changeModel",
        bus.names.partition(name),
        MessageType.CHANGE,
        codec.encode(request),
        answers=MessageType.CHANGED,
    )
    ownership = codec.decode(answer, Ownership)
    await wait_until_seen(lambda: _is_current(call, ownership))
    return RouteReply(_to_grants(call, ownership))


def _is_current(call: RequestContext, ownership: Ownership) -> bool:
    known = call.gateway.catalog.owners.of(ownership.owned)
    return known is not None and known.revision >= ownership.revision


def _to_grants(call: RequestContext, ownership: Ownership) -> models.Grants:
    uses = [models.Grant(tenant, "use") for tenant in ownership.uses]
    writes = [models.Grant(tenant, "write") for tenant in ownership.writes]
    return models.Grants(call.caller.shown(ownership.owned), ownership.tenant, [*uses, *writes], ownership.revision)


async def _show(call: RequestContext) -> RouteReply:
    return await _request_change(call, Change.SHOW_OWNER)


async def _grant(call: RequestContext) -> RouteReply:
    right = Right.WRITE if call.body.right == "write" else Right.USE
    return await _request_change(call, Change.GRANT, grantee=call.path("tenant"), right=int(right))


async def _revoke(call: RequestContext) -> RouteReply:
    return await _request_change(call, Change.GRANT, grantee=call.path("tenant"), right=int(Right.NONE))


async def _hand_over(call: RequestContext) -> RouteReply:
    return await _request_change(call, Change.HAND_OVER, grantee=call.body.tenant)


_ONE = "/v1/models/{name}/grants/{tenant}"
_ANSWER = {200: models.Grants}

ROWS = [
    RouteSpec(
        "GET",
        "/v1/models/{name}/grants",
        "Show the owner and the grants of a model",
        TAG,
        _show,
        _ANSWER,
        "models:read",
        errors=(404, 503),
    ),
    RouteSpec(
        "PUT",
        _ONE,
        "Grant a tenant, or every tenant with *, the right to use or write a model",
        TAG,
        _grant,
        _ANSWER,
        "models:write",
        body=models.WantedGrant,
        errors=(404, 503),
    ),
    RouteSpec(
        "DELETE",
        _ONE,
        "Revoke the grant of a tenant, or of every tenant with *",
        TAG,
        _revoke,
        _ANSWER,
        "models:write",
        errors=(404, 503),
    ),
    RouteSpec(
        "PUT",
        "/v1/models/{name}/owner",
        "Transfer a model to another tenant",
        TAG,
        _hand_over,
        _ANSWER,
        "admin",
        body=models.WantedOwner,
        errors=(404, 503),
    ),
]
