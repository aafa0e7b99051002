"""Bodies of administrative routes; see :mod:`tether.gateway_http.schemas.common`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Scope = Literal["infer", "jobs", "models:read", "models:write", "models:code", "metrics", "admin"]

# tenants

Patterns = Annotated[
    list[str],
    Meta(
        min_length=1,
        max_length=32,
        description="Model names, in which `*` matches any characters except a slash. "
        "`fraud-*` matches models of the key's own "
        "tenant and of `default`, `acme/fraud-*` those in the namespace of `acme`, and `*` alone all.",
    ),
]
Quota = Annotated[int, Meta(ge=0, le=1 << 62)]


class Quotas(Struct):
    """Limits over the whole platform; 0: no limit."""

    queued_jobs: int
    stored_bytes: int
    requests_per_minute: int


class QuotaChange(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Quotas to change: unfinished durable jobs, bytes of pushed versions, requests per minute; 0: no limit."""

    queued_jobs: Quota | UnsetType = UNSET
    stored_bytes: Quota | UnsetType = UNSET
    requests_per_minute: Quota | UnsetType = UNSET


class TenantChange(Struct, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """Changes of a tenant. `weight`: its share of a saturated platform, relative to other tenants."""

    models: Patterns | UnsetType = UNSET
    isolated: bool | UnsetType = UNSET
    sealed: bool | UnsetType = UNSET
    weight: Annotated[float, Meta(ge=0.01, le=1000)] | UnsetType = UNSET
    quotas: QuotaChange | UnsetType = UNSET


class NewTenant(TenantChange, kw_only=True):
    """A tenant to create; omitted fields have their defaults. `restore`: restore a removed tenant with its
    models, grants and jobs; without it, the name of a removed tenant is rejected."""

    name: str
    restore: bool = False


class TenantUse(Struct):
    """Unfinished durable jobs, bytes of pushed versions, and valid keys."""

    queued_jobs: int
    stored_bytes: int
    keys: int


class Tenant(Struct, omit_defaults=True):
    """A tenant; `use` is present if a single tenant was requested."""

    name: str
    models: list[str]
    isolated: bool
    sealed: bool
    weight: float
    quotas: Quotas
    created_at: str
    use: TenantUse | UnsetType = UNSET


class Tenants(Struct):
    """Every tenant with a record, by name."""

    tenants: list[Tenant]


# keys

Years = 10 * 365 * 86400


class NewKey(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """An API key to create; `admin` implies every other scope. `rate` is requests per second, `expires_s`
    seconds from now; 0: no limit, no expiry."""

    tenant: str
    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=16)]
    name: Annotated[str, Meta(max_length=200)] = ""
    models: Patterns | UnsetType = UNSET
    rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    burst: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    concurrency: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    expires_s: Annotated[float, Meta(ge=0, le=Years)] = 0.0


class Key(Struct, omit_defaults=True, kw_only=True):
    """An API key without its secret; `replaces` is the key that it was rotated from."""

    id: str
    tenant: str
    scopes: list[str]
    name: str
    created_at: str
    revoked: bool
    models: list[str]
    rate: float
    burst: int
    concurrency: int
    expires_at: str | UnsetType = UNSET
    last_used_at: str | UnsetType = UNSET
    replaces: str | UnsetType = UNSET


class CreatedKey(Key, kw_only=True):
    """A new API key. `key` is its text: it is not stored and not shown again."""

    key: str


class Keys(Struct):
    """Every API key, oldest first."""

    keys: list[Key]


class Rotation(Struct, forbid_unknown_fields=True):
    """Seconds for which the old key stays valid."""

    grace_s: Annotated[float, Meta(ge=0, le=90 * 86400)] = 0.0


# sessions

SessionScope = Literal["infer", "jobs", "models:read", "models:write", "models:code"]


class NewSession(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A session to create, for `ttl_s` seconds. Omitted fields are those of its API key, but never `admin`,
    nor `models:code` of an admin key."""

    ttl_s: Annotated[float, Meta(ge=1, le=3600)] = 900.0
    scopes: Annotated[list[SessionScope], Meta(min_length=1, max_length=16)] | UnsetType = UNSET
    models: Patterns | UnsetType = UNSET


class Session(Struct):
    """A new session. `token` is sent like an API key; it is not stored and not shown again."""

    token: str
    id: str
    key: str
    tenant: str
    scopes: list[str]
    models: list[str]
    expires_at: str


# audit log


class AuditEntry(Struct, omit_defaults=True):
    """One entry of the audit log; fields that do not apply are omitted. `writer` is the service that recorded
    it, `actor` the key (`key:<id>`) that acted, `count` the number of identical events merged into it."""

    at: str
    kind: str
    writer: str
    actor: str
    action: str
    outcome: str
    tenant: str = ""
    model: str = ""
    version: int = 0
    job: str = ""
    request_id: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    count: int = 1
    address: str = ""
    detail: str = ""


class AuditEntries(Struct, omit_defaults=True):
    """Entries, newest first; `next_cursor` is present if there may be more."""

    entries: list[AuditEntry]
    next_cursor: str | UnsetType = UNSET
