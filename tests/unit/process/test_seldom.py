"""Log lines that others can cause are few, and say how many there were."""

from __future__ import annotations

from tether.process.log_rate_limiter import LINES, LogRateLimiter


def test_ten_of_a_kind_pass_in_a_second_and_the_next_says_how_many_did_not() -> None:
    now = [100.0]
    seldom = LogRateLimiter(lambda: now[0])
    assert [seldom.passes("a") for _ in range(LINES)] == [0] * LINES
    assert [seldom.passes("a") for _ in range(7)] == [None] * 7
    assert seldom.passes("b") == 0
    now[0] += 1.0
    assert [seldom.passes("a"), seldom.passes("a")] == [7, 0]
