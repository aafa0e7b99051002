"""What a model's queue policy means for one waiting request. Pure."""

from __future__ import annotations

from typing import NamedTuple

from tether.model.config import QueuePolicy, TimeoutAction


class RequestTimeouts(NamedTuple):
    """Seconds that a request may take: until it is answered, and until it must have begun to run."""

    total_s: float
    queued_s: float


def waits(policy: QueuePolicy, asked_s: float, limit_s: float) -> RequestTimeouts:
    """How long a request may wait that asked for ``asked_s`` (``limit_s``, where it asked for nothing)."""
    if not policy.timeout_ms:
        return RequestTimeouts(asked_s, asked_s)
    total_s = asked_s if policy.allow_timeout_override else limit_s
    if policy.timeout_action is TimeoutAction.DELAY:
        return RequestTimeouts(total_s, total_s)
    return RequestTimeouts(total_s, min(total_s, policy.timeout_ms / 1000))


def delays_s(policy: QueuePolicy) -> float:
    """After how many seconds a request is to let those pass that have waited less; 0: never."""
    return policy.timeout_ms / 1000 if policy.timeout_action is TimeoutAction.DELAY else 0.0
