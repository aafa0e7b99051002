"""The chunk store, for administrators: its contents and maintenance."""

from __future__ import annotations

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import Change, ChangeAnswer, ChangeRequest
from tether.errors import TetherError
from tether.gateway_http.api.route_spec import Handler, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.api.routes.models import TAG
from tether.gateway_http.schemas import models
from tether.wire import codec

_WAIT_S = 30.0
"""Counting a large store takes seconds."""


def _asking(change: Change, status: int) -> Handler:
    async def handler(call: RequestContext) -> RouteReply:
        body = codec.encode(ChangeRequest(change, "", **call.caller.asker._asdict()))
        bus = call.gateway.bus
        # an owner maintains its own partitions only, but any owner can count the whole store
        for partition in range(1 if change is Change.SHOW_STORE else bus.names.partitions):
            answer = await ask_owner(
                bus, "changeModel", partition, MessageType.CHANGE, body, answers=MessageType.CHANGED, timeout=_WAIT_S
            )
        return RouteReply(_store(codec.decode(answer, ChangeAnswer)), status)

    return handler


def _store(answer: ChangeAnswer) -> models.Store:
    found = answer.store
    if found is None:
        raise TetherError("the model store's reply lacks the state of its chunk store")
    return models.Store(
        chunks=found.chunks,
        stored_bytes=found.stored_bytes,
        named_chunks=found.named_chunks,
        named_bytes=found.named_bytes,
        unreferenced_chunks=found.unreferenced_chunks,
        damaged=[models.DamagedChunk(chunk.digest, list(chunk.versions)) for chunk in found.damaged],
    )


def _row(method: str, path: str, summary: str, change: Change, status: int) -> RouteSpec:
    handler = _asking(change, status)
    return RouteSpec(method, path, summary, TAG, handler, {status: models.Store}, "admin", errors=(503,))


ROWS = [
    _row("GET", "/v1/store", "Show the contents of the chunk store", Change.SHOW_STORE, 200),
    _row("POST", "/v1/store:collect", "Start to delete unreferenced chunks", Change.COLLECT, 202),
    _row("POST", "/v1/store:scrub", "Start to verify every stored chunk", Change.SCRUB, 202),
]
