"""Routes of durable jobs, except submission, which is on the fast path."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from msgspec import Meta, Struct

from tether.domain.job import JobState
from tether.domain.model_names import WRITTEN
from tether.errors import InvalidRequest
from tether.gateway_http.api.route_spec import Header, RequestContext, RouteReply, RouteSpec
from tether.gateway_http.jobs.view import shown_job
from tether.gateway_http.schemas import common

TAG = "Jobs"
MAX_IDS = 200

_JOB_ID = re.compile(r"[0-9a-f]{32}")

Wait = Annotated[
    float, Meta(ge=0, description="Seconds to wait until the job finishes; capped by the setting max_wait_s.")
]


class JobQuery(Struct, forbid_unknown_fields=True):
    """Query of one job."""

    wait: Wait = 0.0


class JobsQuery(Struct, forbid_unknown_fields=True):
    """Query of several jobs: by ``ids``, or by state and model with a cursor."""

    ids: Annotated[str, Meta(description="Comma-separated job ids, at most 200; excludes the other filters.")] = ""
    wait: Wait = 0.0
    state: Annotated[JobState | None, Meta(description="Only jobs in this state.")] = None
    model: Annotated[str, Meta(description="Only jobs of this model.", pattern=WRITTEN)] = ""
    limit: Annotated[int, Meta(ge=1, le=1000, description="Maximum number of jobs in the response.")] = 100
    cursor: Annotated[
        str, Meta(pattern="^[A-Za-z0-9_-]{0,64}$", description="`next_cursor` of the previous response.")
    ] = ""


def _wait(call: RequestContext) -> float:
    wait: float = call.query.wait
    if math.isinf(wait):
        raise InvalidRequest("query parameter 'wait' must be a number of seconds", field="wait")
    return min(wait, call.gateway.settings.max_wait_s)


async def _get(call: RequestContext) -> RouteReply:
    found = call.gateway.jobs.get(call.tenant, call.path("id"), _wait(call), call.caller.may_use_model)
    return RouteReply(_shown(call, await call.gateway.disconnects.wait(found)))


def _shown(call: RequestContext, job: dict[str, Any]) -> dict[str, Any]:
    return shown_job(job, call.caller.shown, call.caller.told)


async def _list(call: RequestContext) -> RouteReply:
    query: JobsQuery = call.query
    jobs, wait = call.gateway.jobs, _wait(call)
    if query.ids:
        found_many = jobs.get_many(call.tenant, _ids(query), wait, call.caller.may_use_model)
        return RouteReply({"jobs": [_shown(call, job) for job in await call.gateway.disconnects.wait(found_many)]})
    if wait:
        raise InvalidRequest("query parameter 'wait' needs 'ids'", field="wait")
    state = "" if query.state is None else query.state.value
    model = call.caller.named(query.model) if query.model else ""
    listed, cursor = await jobs.list(
        call.tenant, state=state, model=model, limit=query.limit, cursor=query.cursor, sees=call.caller.may_use_model
    )
    found = [_shown(call, job) for job in listed]
    return RouteReply({"jobs": found} if cursor is None else {"jobs": found, "next_cursor": cursor})


def _ids(query: JobsQuery) -> list[str]:
    if query.state is not None or query.model or query.cursor:
        raise InvalidRequest("query parameter 'ids' excludes state, model and cursor", field="ids")
    found = list(dict.fromkeys(query.ids.split(",")))
    if len(found) > MAX_IDS:
        raise InvalidRequest(f"query parameter 'ids' has {len(found)} ids; at most {MAX_IDS} are allowed", field="ids")
    for job_id in found:
        if _JOB_ID.fullmatch(job_id) is None:
            raise InvalidRequest(
                f"query parameter 'ids': {job_id[:64]!r} is not a job id; expected 32 lower-case hex digits",
                field="ids",
            )
    return found


async def _cancel(call: RequestContext) -> RouteReply:
    return RouteReply(
        _shown(call, await call.gateway.jobs.cancel(call.tenant, call.path("id"), call.caller.may_use_model))
    )


_KEY = Header("idempotency-key", "Requests with the same key create one job, however often they are sent.")

ROWS = [
    RouteSpec(
        "POST",
        "/v1/jobs",
        "Submit a durable job",
        TAG,
        None,
        {202: common.Job},
        "jobs",
        body=common.NewJob,
        headers=(_KEY,),
        errors=(404, 409, 429, 503),
    ),
    RouteSpec(
        "POST",
        "/v1/jobs:batch",
        "Submit many durable jobs",
        TAG,
        None,
        {202: common.Jobs},
        "jobs",
        body=common.NewJobs,
        headers=(_KEY,),
        errors=(404, 409, 429, 503),
    ),
    RouteSpec(
        "GET",
        "/v1/jobs",
        "List jobs, or wait until some finish",
        TAG,
        _list,
        {200: common.Jobs},
        "jobs",
        query=JobsQuery,
        errors=(404, 503),
    ),
    RouteSpec(
        "GET",
        "/v1/jobs/{id}",
        "Show a job, or wait until it finishes",
        TAG,
        _get,
        {200: common.Job},
        "jobs",
        query=JobQuery,
        errors=(404, 503),
    ),
    RouteSpec(
        "DELETE", "/v1/jobs/{id}", "Cancel a job", TAG, _cancel, {200: common.Job}, "jobs", errors=(404, 409, 503)
    ),
]
