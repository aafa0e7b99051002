"""When a silent process counts as stuck."""

from __future__ import annotations

from tether_cli.platform.health_watch import STARTING, Silence

LIMIT_S = 30.0


def silent(silence: Silence, *, pid: int, seconds: int, used_per_s: float = 0.0) -> float:
    """Miss a health check a second; the processor time used at the end."""
    for second in range(seconds):
        silence.missed(pid, 1.0, second * used_per_s)
    return seconds * used_per_s


def answered(pid: int) -> Silence:
    silence = Silence(pid)
    silence.heard(pid)
    return silence


def test_a_process_that_did_nothing_for_the_limit_is_stuck() -> None:
    silence = answered(7)
    assert not silence.over(LIMIT_S, silent(silence, pid=7, seconds=29))
    assert silence.over(LIMIT_S, silent(silence, pid=7, seconds=1))


def test_an_answer_in_between_begins_the_count_anew() -> None:
    silence = answered(7)
    silent(silence, pid=7, seconds=29)
    silence.heard(7)
    assert not silence.over(LIMIT_S, silent(silence, pid=7, seconds=29))


def test_a_process_that_is_at_work_gets_more_time() -> None:
    silence = answered(7)
    assert not silence.over(LIMIT_S, silent(silence, pid=7, seconds=60, used_per_s=0.9))
    assert answered(7).over(LIMIT_S, 0.0) is False
    busy = answered(8)
    assert busy.over(LIMIT_S, silent(busy, pid=8, seconds=int(STARTING * LIMIT_S), used_per_s=0.9))


def test_a_process_that_has_not_answered_yet_gets_more_time() -> None:
    silence = Silence(7)
    assert not silence.over(LIMIT_S, silent(silence, pid=7, seconds=60))
    assert silence.over(LIMIT_S, silent(silence, pid=7, seconds=60))


def test_a_process_that_was_started_again_is_another() -> None:
    silence = answered(7)
    silent(silence, pid=7, seconds=29)
    assert not silence.over(LIMIT_S, silent(silence, pid=8, seconds=29))
    assert not silence.answered
