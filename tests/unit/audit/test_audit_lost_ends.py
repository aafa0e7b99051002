"""The end of an audit log that a power cut took, and one that somebody took."""

from __future__ import annotations

import msgspec
import pytest
from support.brokers.audit_blocks import CHECKPOINTS, DAY, GATEWAY, INFERENCE, KEYS, NOW, Writer, check

from tether import audit, crypto
from tether.audit import Mark, Record, What
from tether.crypto import Historical, Role


def cut_log(*, lost_ms: int = 500, by: crypto.Identity = GATEWAY, said: bool = True) -> list[Record]:
    """The stream lost the last two blocks of a run: one of each chain, written ``lost_ms`` after what is left."""
    records: list[Record] = []
    one = Writer("aaaa", records)
    one.say(What.BEGIN)
    one.entries(INFERENCE)
    one.checkpoint()
    kept = len(records)
    one.now += lost_ms
    one.entries(INFERENCE)
    one.checkpoint()
    heads = [Mark(one.now, What.PREVIOUS, "aaaa", name, 1, c.number, c.head) for name, c in one.chains.items()]
    del records[kept:]
    two = Writer("bbbb", records, now=one.now + 10_000)
    two.mark(Mark(two.now, What.BEGIN, "bbbb"), *heads)
    three = Writer("cccc", records, now=two.now, who=by)
    if said:
        three.mark(Mark(three.now, What.CUT, "aaaa", number=kept + 2))
    two.say(What.END)
    return records


def test_an_end_that_its_writer_says_was_lost_with_the_power_is_a_note() -> None:
    report = check(cut_log())
    assert report.problems == ()
    assert [INFERENCE in note or CHECKPOINTS in note for note in report.notes if "lost at its end" in note] == [
        True
    ] * 2
    assert all("run aaaa" in note for note in report.notes if "lost at its end" in note)


OTHER = crypto.new_identity("gateway-2", Role.GATEWAY)


@pytest.mark.parametrize(
    "how", ["nobody says so", "another writer says so", "it is minutes", "something later is there"]
)
def test_an_end_that_no_power_cut_explains_is_missing(how: str) -> None:
    both = msgspec.structs.replace(
        KEYS, identities=(*KEYS.identities, OTHER.record(not_before=NOW - DAY, expires_at=NOW + DAY))
    )
    records = cut_log(
        said=how != "nobody says so",
        by=OTHER if how == "another writer says so" else GATEWAY,
        lost_ms=5 * audit.ALIVE_MS if how == "it is minutes" else 500,
    )
    if how == "something later is there":
        one = Writer("aaaa", [], now=NOW + 60_000)
        one.entries("tether.audit.acme.job")
        records.append(msgspec.structs.replace(one.records[0], sequence=records[-1].sequence + 1))
    problems = check(records, keys=Historical([both])).problems
    assert {problem.subject for problem in problems if "at its end" in problem.what} == {INFERENCE, CHECKPOINTS}
