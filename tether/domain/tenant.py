"""Tenants: who owns keys, jobs and models, what each may use, and how much."""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from tether.domain.job import SHARED
from tether.domain.manifest import check_name
from tether.domain.model_names import DEFAULT_TENANT, spelled_out
from tether.errors import BadName, InvalidRequest, QuotaExceeded

_PART = r"[a-z0-9*][a-z0-9._*-]{0,63}"
_PATTERN = re.compile(rf"{_PART}(?:/{_PART})?")
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
    removed_at: float = 0.0
    """When it was removed (UTC seconds); 0: it was not. The record keeps its name from another tenant, which would have what the
    removed one left: models, grants, jobs. All else in it is as in a tenant without a record."""

    @property
    def pool(self) -> str:
        """The pool of its lanes."""
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
    """Return model patterns in which ``*`` stands for any run of characters. One without a tenant before it is about the models of
    the key's own tenant and the plain ones, and ``*`` alone about every model.

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


def allows_model(patterns: tuple[str, ...], model: str, tenant: str = DEFAULT_TENANT) -> bool:
    """Whether one of the patterns, of a key or a session of ``tenant`` or of the tenant itself, matches a model's platform's name."""
    if patterns == EVERY_MODEL:
        return True
    whole = model if "/" in model else f"{DEFAULT_TENANT}/{model}"
    return _matcher(patterns, tenant).fullmatch(whole) is not None


def allows_patterns(patterns: tuple[str, ...], tenant: str, others: tuple[str, ...], other: str) -> bool:
    """Whether all that ``others`` match as patterns of tenant ``other`` is matched by ``patterns`` as those of ``tenant``."""
    # a '*' in a pattern is matched by a '*' only, so what matches the text matches all that the pattern stands for
    matcher = _matcher(patterns, tenant)
    return all(matcher.fullmatch(pattern) is not None for pattern in spelled_out(others, other))


@lru_cache(maxsize=4096)
def _matcher(patterns: tuple[str, ...], tenant: str) -> re.Pattern[str]:
    """A '*' stands for no slash, so none reaches from one namespace into another, but for the pattern that is a '*' alone."""
    parts = [
        ".*" if pattern == "*" else "[^/]*".join(map(re.escape, pattern.split("*")))
        for pattern in spelled_out(patterns, tenant)
    ]
    return re.compile("|".join(f"(?:{part})" for part in parts))
