"""The features that a model's requests use, and one admitted request."""

from __future__ import annotations

from dataclasses import dataclass

from tether.domain.job import Job
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import Shadow


@dataclass(frozen=True)
class RequestPlan:
    """Features of a model's requests. Replaced whenever its configuration or versions change."""

    generation: int
    cache_ttl_s: float = 0.0
    shadows: tuple[Shadow, ...] = ()


@dataclass(frozen=True)
class AdmittedRequest:
    """A synchronous request that was admitted, checked and resolved; ``alias`` is the version as the caller
    wrote it."""

    plan: RequestPlan
    served: ResolvedVersion
    alias: str
    pool: str
    job: Job
    timeout_s: float
