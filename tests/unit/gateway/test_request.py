"""What the hot path reads of a request's headers and parameters."""

from __future__ import annotations

import pytest

from tether.errors import InvalidRequest
from tether.gateway_http.http.request import RequestHeaders, timeout_of


@pytest.mark.parametrize("key", ["k" * 257, "a\tb"])
def test_an_idempotency_key_is_kept_or_refused_and_never_dropped(key: str) -> None:
    with pytest.raises(InvalidRequest):
        RequestHeaders([("idempotency-key", key)])
    assert RequestHeaders([("idempotency-key", "k" * 256)]).idempotency_key == "k" * 256


def test_a_timeout_of_any_size_is_at_most_the_limit() -> None:
    assert timeout_of({"timeout": 10**400}, 30.0) == 30.0
    assert timeout_of({"timeout": 1_500_000}, 30.0) == 1.5
    assert timeout_of({}, 30.0) == 30.0
