"""How long one request may wait by its model's queue policy."""

from __future__ import annotations

import pytest

from tether.gateway_http.bundling.queue_policy import RequestTimeouts, delays_s, waits
from tether.model.config import QueuePolicy, TimeoutAction

DELAY = TimeoutAction.DELAY


@pytest.mark.parametrize(
    ("policy", "asked", "expected"),
    [
        (QueuePolicy(), 5.0, (5.0, 5.0)),
        (QueuePolicy(allow_timeout_override=False), 5.0, (5.0, 5.0)),
        (QueuePolicy(timeout_ms=2000), 30.0, (30.0, 2.0)),
        (QueuePolicy(timeout_ms=2000), 1.0, (1.0, 1.0)),
        (QueuePolicy(timeout_ms=2000, allow_timeout_override=False), 1.0, (30.0, 2.0)),
        (QueuePolicy(timeout_ms=90_000), 30.0, (30.0, 30.0)),
        (QueuePolicy(timeout_ms=2000, timeout_action=DELAY), 5.0, (5.0, 5.0)),
        (QueuePolicy(timeout_ms=2000, timeout_action=DELAY, allow_timeout_override=False), 5.0, (30.0, 30.0)),
    ],
)
def test_a_request_may_shorten_its_wait_and_never_lengthen_it(
    policy: QueuePolicy, asked: float, expected: tuple[float, float]
) -> None:
    assert waits(policy, asked, 30.0) == RequestTimeouts(*expected)


def test_only_a_policy_that_delays_lets_others_pass() -> None:
    assert delays_s(QueuePolicy(timeout_ms=250, timeout_action=DELAY)) == 0.25
    assert delays_s(QueuePolicy(timeout_ms=250)) == 0.0
    assert delays_s(QueuePolicy(timeout_action=DELAY)) == 0.0
