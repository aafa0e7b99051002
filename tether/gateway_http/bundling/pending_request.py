"""A synchronous request that waits for its reply, and the error of a failed one."""

from __future__ import annotations

import asyncio
import math

from tether.domain.job import JobState, Outcome
from tether.domain.tensor import Tensor
from tether.errors import DeadlineExceeded, InferenceFailed, TetherError, by_code
from tether.gateway_http.bundling.lane_bundler import InFlightBundle, LaneBundler

Answer = tuple[Tensor, ...]


class PendingRequest:
    """One job that a caller waits for."""

    __slots__ = ("bundler", "expires", "flight", "future", "late_at", "tenant", "timer")

    def __init__(
        self,
        future: asyncio.Future[Answer],
        timer: asyncio.TimerHandle,
        tenant: str,
        bundler: LaneBundler,
        expires: float,
    ) -> None:
        self.future = future
        self.timer = timer
        self.tenant = tenant
        self.bundler = bundler
        self.expires = expires
        """When its caller stops waiting (UTC seconds); the job itself may have to start earlier."""
        self.late_at = math.inf
        """When it must let others pass, on the monotonic clock."""
        self.flight: InFlightBundle | None = None


def error_of(outcome: Outcome) -> TetherError:
    failure = outcome.error
    if outcome.state is JobState.EXPIRED:
        return DeadlineExceeded("the deadline passed before the job could run")
    return InferenceFailed("the job failed") if failure is None else by_code(failure.code, failure.message)
