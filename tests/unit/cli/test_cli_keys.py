"""How the command line reads durations and rates."""

from __future__ import annotations

import pytest
import typer

from tether_cli.commands.keys import per_second, seconds


@pytest.mark.parametrize(
    ("text", "value"), [("90d", 90 * 86400), ("1h", 3600), ("30m", 1800), ("45s", 45), ("0s", 0), ("1.5h", 5400)]
)
def test_durations_are_a_number_and_a_unit(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1 d", "1w", "1e3s", "1d2h"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="90d"):
        seconds(text)


@pytest.mark.parametrize(("text", "value"), [("100/s", 100), ("120/m", 2), ("3600/h", 1), ("0.5/s", 0.5)])
def test_rates_are_requests_a_second(text: str, value: float) -> None:
    assert per_second(text) == value


@pytest.mark.parametrize("text", ["", "100", "/s", "-1/s", "100/d", "100 /s", "100/min"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="100/s"):
        per_second(text)
