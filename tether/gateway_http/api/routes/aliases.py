"""Aliases and version deletion: promote, split, roll back, delete."""

from __future__ import annotations

from typing import Any

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import Alias, Change, ChangeAnswer, ChangeRequest, Move, Share
from tether.errors import InvalidRequest, ModelNotFound, ModelNotReady, TetherError
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import models
from tether.model.ownership import Right
from tether.wire import codec


async def _changed(call: RequestContext, change: Change, alias: str, **fields: Any) -> Alias | None:
    request = ChangeRequest(change, call.model(), alias, **call.caller.asker._asdict(), **fields)
    bus, body = call.gateway.bus, codec.encode(request)
    again = change is Change.SET_ALIAS
    answer = await ask_owner(
        bus,
        "changeModel",
        bus.names.partition(request.model),
        MessageType.CHANGE,
        body,
        answers=MessageType.CHANGED,
        again=again,
    )
    alias_now = codec.decode(answer, ChangeAnswer).alias
    if alias_now is not None:
        await call.gateway.catalog.wait_for_alias(alias_now)
    return alias_now


async def _set(call: RequestContext) -> RouteReply:
    wanted: models.WantedAlias = call.body
    split = tuple(Share(share.version, share.weight) for share in wanted.split)
    if bool(split) == bool(wanted.version):
        raise InvalidRequest("give either 'version' or 'split'", field="version")
    if not wanted.force:
        _require_ready(call, [wanted.version, *(share.version for share in split)])
    sticky = wanted.sticky and bool(split)
    alias = await _changed(
        call, Change.SET_ALIAS, call.path("alias"), version=wanted.version, split=split, sticky=sticky
    )
    return RouteReply(_alias(call, alias))


def _require_ready(call: RequestContext, versions: list[int]) -> None:
    """Reject versions that no worker hosts."""
    catalog, model = call.gateway.catalog, call.model()
    for number in filter(None, versions):
        served = catalog.versions(model).get(number)
        if served is None:
            raise ModelNotFound(f"model '{model}' has no version '{number}'", field="version")
        if not catalog.workers(served):
            raise ModelNotReady(
                f"no worker hosts version {number} of model '{model}' yet; wait, or set 'force'", field="version"
            )


async def _show(call: RequestContext) -> RouteReply:
    return RouteReply(_alias(call, call.gateway.catalog.alias(call.model(Right.USE), call.path("alias"))))


async def _rollback(call: RequestContext) -> RouteReply:
    return RouteReply(_alias(call, await _changed(call, Change.ROLLBACK, call.body.alias)))


async def _delete_alias(call: RequestContext) -> RouteReply:
    await _changed(call, Change.DELETE_ALIAS, call.path("alias"))
    return RouteReply(models.Gone(call.caller.shown(call.model()), call.path("alias")))


async def _delete_version(call: RequestContext) -> RouteReply:
    text = call.path("version")
    if not text.isdecimal() or not 0 < len(text) < 10:
        raise InvalidRequest(
            "version must be a number; delete an alias at /v1/models/{name}/aliases/{alias}", field="version"
        )
    await _changed(call, Change.DELETE_VERSION, "", version=int(text))
    return RouteReply(models.Gone(call.caller.shown(call.model()), text))


def _alias(call: RequestContext, alias: Alias | None) -> models.AliasDetail:
    if alias is None:
        raise TetherError("the model store's reply lacks the alias")
    return models.AliasDetail(
        model=call.caller.shown(alias.model),
        alias=alias.name,
        version=alias.version,
        split=_shares(alias.split),
        sticky=alias.sticky,
        revision=alias.revision,
        previous=[_move(move) for move in alias.previous],
        undone=[_move(move) for move in alias.undone],
    )


def _move(move: Move) -> models.AliasMove:
    return models.AliasMove(move.version, _shares(move.split), rfc3339(move.moved_at))


def _shares(split: tuple[Share, ...]) -> list[models.Share]:
    return [models.Share(share.version, share.weight) for share in split]


_ALIAS = "/v1/models/{name}/aliases/{alias}"

ROWS = [
    RouteSpec(
        "GET",
        _ALIAS,
        "Show an alias and its history",
        TAG,
        _show,
        {200: models.AliasDetail},
        "models:read",
        errors=(404,),
    ),
    RouteSpec(
        "PUT",
        _ALIAS,
        "Point an alias at a version, or split its requests",
        TAG,
        _set,
        {200: models.AliasDetail},
        "models:write",
        body=models.WantedAlias,
        errors=(404, 409, 503),
    ),
    RouteSpec(
        "DELETE",
        _ALIAS,
        "Remove an alias",
        TAG,
        _delete_alias,
        {200: models.Gone},
        "models:write",
        errors=(404, 503),
    ),
    RouteSpec(
        "POST",
        "/v1/models/{name}/rollback",
        "Point an alias at its previous version or split",
        TAG,
        _rollback,
        {200: models.AliasDetail},
        "models:write",
        body=models.WantedRollback,
        errors=(404, 409, 503),
    ),
    RouteSpec(
        "DELETE",
        "/v1/models/{name}/versions/{version}",
        "Delete a version that no alias points at",
        TAG,
        _delete_version,
        {200: models.Gone},
        "models:write",
        errors=(404, 409, 503),
    ),
]
