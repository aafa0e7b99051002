"""A flood of attempts in the audit log: who varies what it shows hides nothing that others do."""

from __future__ import annotations

from tether.audit import NOBODY, Kind
from tether.audit.repeated_attempts import MOST_GROUPS, MOST_OF_ONE, OTHERS, Attempt, Attempts


def test_who_chooses_what_it_shows_hides_no_refusal_of_others() -> None:
    """Unknown key ids, and the names that one key asks for."""
    attempts = Attempts()
    for number in range(500):
        attempts.add(Attempt(Kind.AUTH, "", f"key:{number}", "infer", "unauthenticated"), number, "", NOBODY)
        attempts.add(Attempt(Kind.AUTH, "acme", "key:own", "infer", "forbidden", f"m-{number}"), number, "", "key:own")
    attempts.add(Attempt(Kind.AUTH, "rival", "key:known", "GET /v1/keys", "forbidden"), 501, "", "key:known")
    taken = attempts.take()
    assert sum(seen.count for seen in taken.values()) == 1001
    assert [attempt.action for attempt in taken if attempt.actor == "key:known"] == ["GET /v1/keys"]
    others = {attempt.actor: seen.count for attempt, seen in taken.items() if attempt.action == OTHERS}
    assert others == {NOBODY: 500 - MOST_OF_ONE, "key:own": 500 - MOST_OF_ONE}
    assert len(attempts) == 0
    attempts.add(Attempt(Kind.AUTH, "", "key:1", "infer", "unauthenticated"), 1000, "", NOBODY)
    assert next(iter(attempts.take())).actor == "key:1", "the next second has room again"


def test_so_many_are_told_apart_and_no_more() -> None:
    attempts = Attempts()
    for number in range(1000):
        attempts.add(Attempt(Kind.AUTH, "", f"key:{number}", "infer", "forbidden"), number, "", f"key:{number}")
    assert len(attempts) == MOST_GROUPS + 1
