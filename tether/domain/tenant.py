"""Tenants: owners of keys, jobs and models, with their rights and quotas."""

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
"""More would make a pattern take seconds to match."""

EVERY_MODEL = ("*",)


class Quotas(msgspec.Struct, frozen=True):
    """Limits of one tenant over the whole platform; 0: no limit."""

    queued_jobs: int = 0
    """Accepted, unfinished durable jobs."""
    stored_bytes: int = 0
    """Bytes of the model versions that the tenant pushed, including deleted ones until they are collected."""
    requests_per_minute: int = 0


class Tenant(msgspec.Struct, frozen=True):
    """The record of a tenant. ``created_at`` is UTC seconds."""

    name: str
    models: tuple[str, ...] = EVERY_MODEL
    """Patterns of the models that its keys may use at most."""
    isolated: bool = False
    """It has its own lanes and workers, and shares no batch or worker process with another tenant."""
    sealed: bool = False
    """Its inputs and outputs are encrypted between gateway and worker."""
    weight: float = 1.0
    """Its share of a saturated platform, relative to other tenants."""
    quotas: Quotas = Quotas()
    created_at: float = 0.0
    removed_at: float = 0.0
    """When it was removed (UTC seconds); 0: not removed. The tombstone reserves the name: a new tenant would
    inherit the models, grants and jobs. Its other fields are defaults."""

    @property
    def pool(self) -> str:
        """The pool of its lanes."""
        return self.name if self.isolated else SHARED


def check_tenant_name(name: str, *, field: str = "tenant") -> str:
    """Return ``name`` if a tenant may have it.

    Raises:
        BadName: with the violated rule.
    """
    if check_name(name, field=field) == SHARED:
        raise BadName(f"{field} '{SHARED}' is reserved; choose another name", field=field)
    return name


def check_stored_bytes(tenant: Tenant, stored: int, more: int) -> None:
    """Check that a tenant may store ``more`` bytes of versions beyond ``stored``.

    Raises:
        QuotaExceeded: its quota ``stored_bytes`` is too small.
    """
    limit = tenant.quotas.stored_bytes
    if limit and stored + more > limit:
        raise QuotaExceeded(
            f"tenant '{tenant.name}' has {stored} bytes of model versions and needs {more} more, but "
            f"its quota stored_bytes is {limit}",
            field="stored_bytes",
            retry_after=60,
        )


def check_patterns(patterns: tuple[str, ...], *, field: str = "models") -> tuple[str, ...]:
    """Return model patterns, in which ``*`` matches any run of characters except a slash.

    A pattern without a tenant matches models of the key's own tenant and plain ones; ``*`` alone matches
    every model.

    Raises:
        InvalidRequest: a pattern is invalid, or there is none.
    """
    if not patterns:
        raise InvalidRequest(f"{field} must name at least one model or pattern, such as '*'", field=field)
    for pattern in patterns:
        if _PATTERN.fullmatch(pattern) is None or pattern.count("*") > _MAX_STARS:
            shown = pattern[:64].encode("ascii", "backslashreplace").decode()
            raise InvalidRequest(
                f"{field}: {shown!r} is not a model name or a pattern with at most {_MAX_STARS} '*'", field=field
            )
    return patterns


def allows_model(patterns: tuple[str, ...], model: str, tenant: str = DEFAULT_TENANT) -> bool:
    """Return True if a pattern of ``tenant``, or of its key or session, matches a model's platform name."""
    if patterns == EVERY_MODEL:
        return True
    whole = model if "/" in model else f"{DEFAULT_TENANT}/{model}"
    return _matcher(patterns, tenant).fullmatch(whole) is not None


def allows_patterns(patterns: tuple[str, ...], tenant: str, others: tuple[str, ...], other: str) -> bool:
    """Return True if ``patterns`` of ``tenant`` match everything that ``others`` of tenant ``other`` match."""
    # only '*' matches a '*', so a match of the pattern's text matches everything that the pattern does
    matcher = _matcher(patterns, tenant)
    return all(matcher.fullmatch(pattern) is not None for pattern in spelled_out(others, other))


@lru_cache(maxsize=4096)
def _matcher(patterns: tuple[str, ...], tenant: str) -> re.Pattern[str]:
    """Compile patterns. '*' does not match a slash, so it stays in one namespace, except as a pattern of its
    own."""
    parts = [
        ".*" if pattern == "*" else "[^/]*".join(map(re.escape, pattern.split("*")))
        for pattern in spelled_out(patterns, tenant)
    ]
    return re.compile("|".join(f"(?:{part})" for part in parts))
