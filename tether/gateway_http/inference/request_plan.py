"""What a model's configuration adds to the way of its requests, and one such request."""

from __future__ import annotations

from dataclasses import dataclass

from tether.domain.job import Job
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import Shadow


@dataclass(frozen=True)
class RequestPlan:
    """What is to be done for a model's requests. Every change of its configuration or versions makes another one."""

    generation: int
    cache_ttl_s: float = 0.0
    shadows: tuple[Shadow, ...] = ()


@dataclass(frozen=True)
class AdmittedRequest:
    """One synchronous request that was let in, checked and resolved; ``alias`` is the version as the caller wrote it."""

    plan: RequestPlan
    served: ResolvedVersion
    alias: str
    pool: str
    job: Job
    timeout_s: float
