"""What the bodies of administration hold; see :mod:`tether.gateway_http.bodies`."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

# tenants

Patterns = Annotated[
    list[str], Meta(min_length=1, max_length=32, description="Model names, in which `*` stands for any characters.")
]
Quota = Annotated[int, Meta(ge=0, le=1 << 62)]


class Quotas(Struct):
    """Upper bounds over the whole platform; 0 means no bound."""

    queued_jobs: int
    stored_bytes: int
    requests_per_minute: int


class QuotaChange(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Quotas to change: durable jobs that have not ended, bytes of pushed versions, requests a minute; 0: no bound."""

    queued_jobs: Quota | UnsetType = UNSET
    stored_bytes: Quota | UnsetType = UNSET
    requests_per_minute: Quota | UnsetType = UNSET


class TenantChange(Struct, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """What to change of a tenant. `weight`: its share of a saturated platform, relative to the others'."""

    models: Patterns | UnsetType = UNSET
    isolated: bool | UnsetType = UNSET
    sealed: bool | UnsetType = UNSET
    weight: Annotated[float, Meta(ge=0.01, le=1000)] | UnsetType = UNSET
    quotas: QuotaChange | UnsetType = UNSET


class NewTenant(TenantChange, kw_only=True):
    """A tenant to make; what is left out has its default."""

    name: str


class TenantUse(Struct):
    """Durable jobs that have not ended, and keys that count."""

    queued_jobs: int
    keys: int


class Tenant(Struct, omit_defaults=True):
    """A tenant; `use` is told when one is asked for."""

    name: str
    models: list[str]
    isolated: bool
    sealed: bool
    weight: float
    quotas: Quotas
    created_at: str
    use: TenantUse | UnsetType = UNSET


class Tenants(Struct):
    """Every tenant that has a record, by name."""

    tenants: list[Tenant]
