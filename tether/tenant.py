"""Tenants: who owns keys, jobs and models, what each may use, and how much."""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from tether.errors import BadName, InvalidRequest, QuotaExceeded
from tether.job import SHARED
from tether.model import check_name

_PATTERN = re.compile(r"[a-z0-9*][a-z0-9._*-]{0,63}")
_MAX_STARS = 4
"""More would let one pattern cost seconds to match."""

EVERY_MODEL = ("*",)


class Quotas(msgspec.Struct, frozen=True):
    """Upper bounds for one tenant, over the whole platform; 0 means no bound."""

    queued_jobs: int = 0
    """Durable jobs that were accepted and have not ended."""
    stored_bytes: int = 0
    """Bytes of the model versions that the tenant pushed, and of deleted ones until they are collected."""
    requests_per_minute: int = 0


class Tenant(msgspec.Struct, frozen=True):
    """What the platform knows of a tenant. ``created_at`` is UTC seconds."""

    name: str
    models: tuple[str, ...] = EVERY_MODEL
    """Patterns of the models that its keys may use at most."""
    isolated: bool = False
    """It has lanes and workers of its own and shares no batch and no worker process with another tenant."""
    sealed: bool = False
    """Its inputs and outputs are encrypted between gateway and worker."""
    weight: float = 1.0
    """Its share of a saturated platform, relative to the other tenants'."""
    quotas: Quotas = Quotas()
    created_at: float = 0.0

    @property
    def scope(self) -> str:
        """The scope of its lanes."""
        return self.name if self.isolated else SHARED


def check_tenant_name(name: str, *, field: str = "tenant") -> str:
    """Return ``name`` when a tenant may have it.

    Raises:
        BadName: with the rule that it breaks.
    """
    if check_name(name, field=field) == SHARED:
        raise BadName(f"{field} '{SHARED}' is reserved; choose another name", field=field)
    return name


def check_stored_bytes(tenant: Tenant, stored: int, more: int) -> None:
    """Prove that a tenant may store ``more`` bytes of versions beside ``stored``.

    Raises:
        QuotaExceeded: its quota ``stored_bytes`` is too small.
    """
    limit = tenant.quotas.stored_bytes
    if limit and stored + more > limit:
        raise QuotaExceeded(
            f"tenant '{tenant.name}' has {stored} bytes of model versions and {more} more would come; "
            f"its quota stored_bytes is {limit}",
            field="stored_bytes",
            retry_after=60,
        )


def check_patterns(patterns: tuple[str, ...], *, field: str = "models") -> tuple[str, ...]:
    """Return model patterns in which ``*`` stands for any run of characters.

    Raises:
        InvalidRequest: one is no pattern that a model name could match, or there is none.
    """
    if not patterns:
        raise InvalidRequest(f"{field} must name at least one model or pattern, such as '*'", field=field)
    for pattern in patterns:
        if _PATTERN.fullmatch(pattern) is None or pattern.count("*") > _MAX_STARS:
            shown = pattern[:64].encode("ascii", "backslashreplace").decode()
            raise InvalidRequest(
                f"{field}: {shown!r} is no model name or pattern with at most {_MAX_STARS} '*'", field=field
            )
    return patterns


def allows_model(patterns: tuple[str, ...], model: str) -> bool:
    """Whether one of the patterns matches a model's name."""
    return patterns == EVERY_MODEL or _matcher(patterns).fullmatch(model) is not None


@lru_cache(maxsize=4096)
def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = (".*".join(re.escape(part) for part in pattern.split("*")) for pattern in patterns)
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives))
