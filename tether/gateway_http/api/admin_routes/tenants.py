"""Tenants: create, show, change, remove."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from tether.domain.tenant import Quotas, Tenant, check_tenant_name
from tether.errors import Conflict, NotFound
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.jobs.view import rfc3339
from tether.gateway_http.schemas import admin as bodies

TAG = "Administration"


async def _create(call: RequestContext) -> RouteReply:
    wanted: bodies.NewTenant = call.body
    name = check_tenant_name(wanted.name, field="name")
    fresh = Tenant(name, models=call.caller.bound(None, name), created_at=call.gateway.bus.clock.utc())
    changed = _changed(call, fresh, wanted)
    if not wanted.restore:
        call.gateway.tenants.require_unused(name)
    elif call.gateway.tenants.removed(name):
        await call.gateway.tenants.store(changed)
        return RouteReply(_shown(changed), 201)
    if not await call.gateway.tenants.create(changed):
        raise Conflict(
            f"tenant '{name}' already exists; change it with PATCH or 'tether tenant set {name}'", field="name"
        )
    return RouteReply(_shown(changed), 201)


def _changed(call: RequestContext, tenant: Tenant, wanted: bodies.TenantChange) -> Tenant:
    """Return the tenant with the requested changes.

    Raises:
        InvalidRequest: a pattern is not valid.
        Forbidden: a pattern goes beyond the caller's own.
    """
    given = {name: value for name in ("isolated", "sealed", "weight") if (value := getattr(wanted, name)) is not UNSET}
    if not isinstance(wanted.models, msgspec.UnsetType):
        given["models"] = call.caller.bound(tuple(wanted.models), tenant.name)
    if not isinstance(wanted.quotas, msgspec.UnsetType):
        given["quotas"] = _quotas(tenant.quotas, wanted.quotas)
    return msgspec.structs.replace(tenant, **given)


def _quotas(quotas: Quotas, wanted: bodies.QuotaChange) -> Quotas:
    given = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not UNSET}
    return msgspec.structs.replace(quotas, **given)


async def _list(call: RequestContext) -> RouteReply:
    return RouteReply(bodies.Tenants([_shown(tenant) for tenant in call.gateway.tenants.known()]))


def _found(call: RequestContext) -> Tenant:
    name = call.path("tenant")
    found = call.gateway.tenants.find(name)
    if found is None:
        raise NotFound(
            f"tenant '{name[:64]}' has no record, so its keys have the default rights; create one with "
            f"POST or 'tether tenant create {name[:64]}'",
            field="tenant",
        )
    return found


async def _show(call: RequestContext) -> RouteReply:
    tenant = _found(call)
    return RouteReply(_shown(tenant, await _use(call.gateway, tenant.name)))


async def _use(gateway: Gateway, name: str) -> bodies.TenantUse:
    now = gateway.bus.clock.utc()
    keys = [key for key in gateway.keys.known() if key.tenant == name and key.counts(now)]
    return bodies.TenantUse(
        queued_jobs=await gateway.jobs.room.open.count(name),
        stored_bytes=gateway.catalog.stored.of(name),
        keys=len(keys),
    )


async def _change(call: RequestContext) -> RouteReply:
    tenant = _changed(call, _found(call), call.body)
    await call.gateway.tenants.store(tenant)
    return RouteReply(_shown(tenant))


async def _remove(call: RequestContext) -> RouteReply:
    gateway, tenant = call.gateway, _found(call)
    use = await _use(gateway, tenant.name)
    if use.keys:
        raise Conflict(f"tenant '{tenant.name}' has {use.keys} valid keys; revoke them first", field="tenant")
    if use.queued_jobs and tenant.isolated:
        raise Conflict(
            f"tenant '{tenant.name}' has {use.queued_jobs} unfinished jobs; wait for them or cancel them",
            field="tenant",
        )
    await gateway.tenants.remove(tenant.name, gateway.bus.clock.utc())
    return RouteReply(_shown(tenant))


def _shown(tenant: Tenant, use: bodies.TenantUse | msgspec.UnsetType = UNSET) -> bodies.Tenant:
    return bodies.Tenant(
        name=tenant.name,
        models=list(tenant.models),
        isolated=tenant.isolated,
        sealed=tenant.sealed,
        weight=tenant.weight,
        quotas=msgspec.convert(tenant.quotas, bodies.Quotas, from_attributes=True),
        created_at=rfc3339(tenant.created_at),
        use=use,
    )


_ONE = "/v1/tenants/{tenant}"

ROWS = [
    RouteSpec(
        "POST",
        "/v1/tenants",
        "Create a tenant",
        TAG,
        _create,
        {201: bodies.Tenant},
        "admin",
        body=bodies.NewTenant,
        errors=(409,),
        grows=True,
    ),
    RouteSpec("GET", "/v1/tenants", "List tenants", TAG, _list, {200: bodies.Tenants}, "admin"),
    RouteSpec("GET", _ONE, "Show a tenant and its usage", TAG, _show, {200: bodies.Tenant}, "admin", errors=(404, 503)),
    RouteSpec(
        "PATCH",
        _ONE,
        "Change a tenant",
        TAG,
        _change,
        {200: bodies.Tenant},
        "admin",
        body=bodies.TenantChange,
        errors=(404, 409, 503),
    ),
    RouteSpec(
        "DELETE",
        _ONE,
        "Remove a tenant that has no keys",
        TAG,
        _remove,
        {200: bodies.Tenant},
        "admin",
        errors=(404, 409, 503),
    ),
]
