"""The audit log over HTTP."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct

from tether.audit import Kind
from tether.audit.reader import Filter, Found
from tether.domain.model_names import WRITTEN
from tether.errors import InvalidRequest
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import admin as bodies

TAG = "Administration"

_CURSOR = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})")

Text = Annotated[str, Meta(max_length=64)]
ModelText = Annotated[str, Meta(pattern=WRITTEN)]


class AuditQuery(Struct, forbid_unknown_fields=True):
    """Query of the audit log; every parameter is an optional filter."""

    tenant: Annotated[str, Meta(description="Only entries of this tenant.", max_length=64)] = ""
    kind: Annotated[Kind | None, Meta(description="Only entries of this kind.")] = None
    since: Annotated[str, Meta(description="Not before this time (RFC 3339).", max_length=40)] = ""
    until: Annotated[str, Meta(description="Before this time (RFC 3339).", max_length=40)] = ""
    model: ModelText = ""
    key: Annotated[str, Meta(description="Only actions of the key with this id.", max_length=64)] = ""
    job: Text = ""
    outcome: Annotated[str, Meta(description="`ok`, or an error's code.", max_length=64)] = ""
    limit: Annotated[int, Meta(ge=1, le=1000, description="Maximum number of entries in the response.")] = 100
    cursor: Annotated[str, Meta(description="`next_cursor` of the previous response.", max_length=40)] = ""


async def _list(call: RequestContext) -> RouteReply:
    query: AuditQuery = call.query
    reader = await call.gateway.audit.reader()
    wanted = Filter(
        tenant=query.tenant,
        kind=query.kind,
        since=_ms(query.since, "since"),
        until=_ms(query.until, "until"),
        model=call.caller.named(query.model) if query.model else "",
        key=query.key,
        job=query.job,
        outcome=query.outcome,
    )
    found, after = await reader.page(wanted, query.limit, _position(query.cursor))
    answer = bodies.AuditEntries([_shown(item) for item in found])
    if after is not None:
        answer.next_cursor = f"{after[0]}.{after[1]}"
    return RouteReply(answer)


def _ms(text: str, field: str) -> int:
    if not text:
        return 0
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(
            f"query parameter '{field}' must be an RFC 3339 time, such as 2026-01-31T12:00:00Z", field=field
        ) from error
    if at.tzinfo is None:
        raise InvalidRequest(f"query parameter '{field}' needs a time zone, such as Z", field=field)
    return int(at.timestamp() * 1000)


def _position(cursor: str) -> tuple[int, int] | None:
    if not cursor:
        return None
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise InvalidRequest("query parameter 'cursor' must be the next_cursor of an earlier response", field="cursor")
    return int(found[1]), int(found[2])


def _shown(found: Found) -> bodies.AuditEntry:
    entry = found.entry
    return bodies.AuditEntry(
        at=rfc3339(entry.at / 1000),
        kind=found.kind.value,
        tenant=found.tenant,
        writer=found.writer,
        actor=entry.actor,
        action=entry.action,
        outcome=entry.outcome,
        model=entry.model,
        version=entry.version,
        job=entry.job,
        request_id=entry.request_id,
        bytes_in=entry.bytes_in,
        bytes_out=entry.bytes_out,
        seconds=entry.micros / 1e6,
        count=entry.count,
        address=entry.address,
        detail=entry.detail,
    )


ROWS = [
    RouteSpec(
        "GET",
        "/v1/audit",
        "Search the audit log, newest first",
        TAG,
        _list,
        {200: bodies.AuditEntries},
        "admin",
        query=AuditQuery,
        errors=(503,),
    )
]
