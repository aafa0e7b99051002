"""Timeouts of one request under its model's queue policy. Pure."""

from __future__ import annotations

from typing import NamedTuple

from tether.model.config import QueuePolicy, TimeoutAction


class RequestTimeouts(NamedTuple):
    """Seconds until a request must be answered, and until it must have started to run."""

    total_s: float
    queued_s: float


def waits(policy: QueuePolicy, asked_s: float, limit_s: float) -> RequestTimeouts:
    """Return the timeouts of a request that asked for ``asked_s`` (``limit_s`` if it asked for none)."""
    if not policy.timeout_ms:
        return RequestTimeouts(asked_s, asked_s)
    total_s = asked_s if policy.allow_timeout_override else limit_s
    if policy.timeout_action is TimeoutAction.DELAY:
        return RequestTimeouts(total_s, total_s)
    return RequestTimeouts(total_s, min(total_s, policy.timeout_ms / 1000))


def delays_s(policy: QueuePolicy) -> float:
    """Return the seconds after which a request lets newer ones pass; 0: never."""
    return policy.timeout_ms / 1000 if policy.timeout_action is TimeoutAction.DELAY else 0.0
