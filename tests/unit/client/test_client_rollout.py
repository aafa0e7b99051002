"""When a wait for a version ends, driven without a socket or a clock."""

from __future__ import annotations

from typing import Any

import pytest
from support.http.drive import BROKEN, Drive, refusal, reply

from tether.client.protocol import Response
from tether.client.rollout import settled, wait_ready
from tether.errors import ModelNotReady


def told(state: str, *, workers: int = 2, ready: int = 0, failed: int = 0, reason: str = "") -> Response:
    body: dict[str, Any] = {"name": "m", "version": 3, "state": state, "reason": reason}
    return reply({**body, "workers": workers, "ready": ready, "failed": failed})


def test_what_is_waited_for_is_told_until_a_worker_answers() -> None:
    said: list[str] = []
    drive = Drive([told("loading"), told("loading", failed=1, reason="no room"), told("ready", ready=1, failed=1)])
    assert drive(lambda policy: settled(policy, "m", 3, said.append))["ready"] == 1
    assert said == ["loading on 2 workers", "1 of 2 workers could not load it: no room", ""]
    assert {send.path for send in drive.sent} == {"/v1/models/m/versions/3/rollout"}


def test_a_failure_that_passes_ends_no_wait_and_one_that_stays_does() -> None:
    passing = [told("failed", failed=2), told("loading"), told("failed", failed=2), told("ready", ready=2)]
    assert Drive(passing)(lambda policy: wait_ready(policy, "m", 3, None))["state"] == "ready"
    drive = Drive([told("failed", failed=2, reason="model_rejected: bad")] * 50, timeout=600)
    with pytest.raises(ModelNotReady, match=r"^version 3 of model 'm' is stored, but not ready: 2 of 2 .*: bad$"):
        drive(lambda policy: wait_ready(policy, "m", 3, None))
    assert 3.0 <= drive.now < 5.0


def test_a_wait_has_an_end() -> None:
    drive = Drive([told("loading", workers=1)] * 50, timeout=7)
    with pytest.raises(ModelNotReady, match=r"not ready after 7 s: loading on 1 worker$"):
        drive(lambda policy: wait_ready(policy, "m", 3, None))
    assert 5.0 < drive.now <= 7.0


def test_a_gateway_that_restarts_is_waited_for() -> None:
    drive = Drive([told("loading"), *[BROKEN] * 12, refusal("unavailable", 503), told("ready", ready=1)], timeout=60)
    assert drive(lambda policy: settled(policy, "m", 3))["state"] == "ready"
