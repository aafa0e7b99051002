"""Sessions: short-lived tokens created with an API key."""

from __future__ import annotations

import msgspec

from tether.domain.api_key import SCOPES
from tether.domain.tenant import check_patterns
from tether.errors import Forbidden
from tether.gateway_http.access.authentication import ANY_SCOPE
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import admin as bodies

TAG = "Sessions"


async def _create(call: RequestContext) -> RouteReply:
    wanted: bodies.NewSession = call.body
    caller, key = call.caller, call.caller.key
    if caller.session is not None:
        raise Forbidden("a session cannot create sessions; use an API key", field="scope")
    models = key.models if isinstance(wanted.models, msgspec.UnsetType) else check_patterns(tuple(wanted.models))

    def ends(now: float) -> float:
        return min(now + wanted.ttl_s, key.expires_at or now + wanted.ttl_s)

    token, session = call.gateway.keys.sessions.issue(
        key.id, key.tenant, scopes=_scopes(call, wanted), models=models, ends=ends
    )
    made = bodies.Session(
        token=token,
        id=session.id,
        key=key.id,
        tenant=key.tenant,
        scopes=list(session.scopes),
        models=list(models),
        expires_at=rfc3339(session.expires_at),
    )
    return RouteReply(made, 201)


def _scopes(call: RequestContext, wanted: bodies.NewSession) -> tuple[str, ...]:
    """Return the requested scopes, or by default those of the key.

    The default never has ``admin`` or ``metrics``, nor ``models:code`` of an admin key.

    Raises:
        Forbidden: the key lacks one of them.
    """
    may = [scope for scope in SCOPES if scope not in ("admin", "metrics") and scope in call.caller.scopes]
    if isinstance(wanted.scopes, msgspec.UnsetType):
        return tuple([scope for scope in may if scope != "models:code" or "admin" not in call.caller.key.scopes])
    for scope in wanted.scopes:
        if scope not in may:
            raise Forbidden(f"this API key lacks the scope '{scope}'", field="scopes")
    return tuple(scope for scope in may if scope in wanted.scopes)


ROWS = [
    RouteSpec(
        "POST",
        "/v1/sessions",
        "Create a short-lived token with the rights of an API key, or fewer",
        TAG,
        _create,
        {201: bodies.Session},
        ANY_SCOPE,
        body=bodies.NewSession,
        body_optional=True,
    )
]
