"""The audit log as bytes: whatever is changed, taken, moved, repeated or cut off is found and named."""

from __future__ import annotations

import io
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.brokers.audit_blocks import (
    ACCESS,
    CHECKPOINTS,
    DAY,
    GATEWAY,
    HOUR,
    INFERENCE,
    KEYS,
    NOW,
    WORKER,
    Writer,
    check,
)

from tether import audit, crypto
from tether.audit import AuditEntry, Chain, Checker, Kind, Mark, Problem, Record, What
from tether.crypto import Historical, MessageType, Role
from tether.errors import BadEncoding, KeyExpired, KeyRevoked, RoleNotAllowed, SubjectMismatch
from tether.wire import codec


def a_log() -> list[Record]:
    """Two chains, four checkpoints, and a second run that refers to the first."""
    records: list[Record] = []
    one = Writer("aaaa", records)
    one.say(What.BEGIN)
    for _ in range(2):
        one.entries(INFERENCE)
        one.entries(ACCESS, 2)
        one.entries(INFERENCE)
        one.checkpoint()
    two = Writer("bbbb", records, now=one.now)
    heads = [Mark(one.now, What.PREVIOUS, "aaaa", name, 1, c.number, c.head) for name, c in one.chains.items()]
    two.mark(Mark(two.now, What.BEGIN, "bbbb"), *heads)
    two.entries(INFERENCE)
    two.checkpoint()
    two.say(What.END)
    return records


def renumbered(records: list[Record]) -> list[Record]:
    """As a stream would hold them that an attacker made: its own numbers have no holes."""
    return [msgspec.structs.replace(record, sequence=number) for number, record in enumerate(records, 1)]


LOG = a_log()
HEADERS = [len(record.frame) - len(crypto.body_of(record.frame)) for record in LOG]


def test_a_whole_log_has_nothing_wrong() -> None:
    found = check(LOG)
    assert found.problems == ()
    assert found.notes == ()
    assert (found.blocks, found.writers) == (len(LOG), ("gateway",))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_found_at_its_block(data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(LOG) - 1))
    frame = bytearray(LOG[where].frame)
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    damaged = [*LOG]
    damaged[where] = msgspec.structs.replace(LOG[where], frame=bytes(frame))
    assert any(problem.sequence == where + 1 for problem in check(damaged).problems)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_of_an_entry_names_the_entry(data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(LOG) - 1))
    frame, start = LOG[where].frame, HEADERS[where]
    block = audit.decode_block(frame[start:])
    index = data.draw(st.integers(0, len(block.entries) - 1))
    chosen = block.entries[index]
    at = start + _position(frame[start:], block.entries, index) + data.draw(st.integers(0, len(chosen) - 1))
    changed = frame[:at] + bytes([frame[at] ^ data.draw(st.integers(1, 255))]) + frame[at + 1 :]
    damaged = [*LOG]
    damaged[where] = msgspec.structs.replace(LOG[where], frame=changed)
    (found, *_) = check(damaged).problems
    assert (found.sequence, found.block, found.entry) == (where + 1, block.number, block.first + index)


def _position(body: bytes, entries: tuple[bytes, ...], index: int) -> int:
    """Where the bytes of an entry begin: entries may be equal, so those before it are passed over."""
    at = 0
    for entry_bytes in entries[: index + 1]:
        at = body.index(entry_bytes, at) + len(entry_bytes)
    return at - len(entries[index])


@given(st.integers(0, len(LOG) - 1))
def test_a_removed_block_is_found_also_where_the_stream_shows_no_hole(where: int) -> None:
    name = LOG[where].message_id
    run, number = name.split(".")[:2]
    kept = renumbered([record for record in LOG if record.message_id != name])
    found = check(kept)
    if where < len(LOG) - 1:
        assert any((problem.run, problem.subject) == (run, LOG[where].subject) for problem in found.problems), number
    else:
        assert "did not record its end" in check(kept, now_ms=NOW + DAY).notes[0]


@given(st.integers(0, len(LOG) - 2))
def test_a_removed_message_leaves_a_hole_in_the_stream(where: int) -> None:
    found = check([*LOG[:where], *LOG[where + 1 :]])
    if where:
        assert f"messages {where + 1} to {where + 1} are missing" in found.problems[0].what
    assert found.problems


@given(st.integers(0, len(LOG) - 1), st.integers(0, len(LOG)))
def test_a_repeated_block_is_found(which: int, at: int) -> None:
    twice = renumbered([*LOG[:at], LOG[which], *LOG[at:]])
    later = max(which, at) + 1 if at > which else which + 2
    assert any(p.sequence == later and "repeated" in p.what for p in check(twice).problems)


@given(st.integers(0, len(LOG) - 1), st.integers(0, len(LOG) - 1))
def test_swapped_blocks_of_a_chain_are_found(one: int, other: int) -> None:
    swapped = [*LOG]
    swapped[one], swapped[other] = swapped[other], swapped[one]
    same = _chain(LOG[one]) == _chain(LOG[other])
    found = check(renumbered(swapped)).problems
    if one != other and same:
        assert any("repeated or moved" in problem.what for problem in found)
    assert bool(check(swapped).problems) == (one != other)


def _chain(record: Record) -> tuple[str, str]:
    return record.message_id.split(".")[0], record.subject


@given(st.integers(1, len(LOG) - 1))
def test_a_log_that_was_cut_off_is_found_by_what_its_writer_remembers(kept: int) -> None:
    ends = {_chain(record): record for record in LOG}
    known = []
    for (run, subject), record in ends.items():
        block = audit.decode_block(crypto.body_of(record.frame))
        known.append(Mark(NOW, What.PREVIOUS, run, subject, 1, block.number, block.head))
    checker = Checker(Historical([KEYS]), 365 * DAY)
    for record in LOG[:kept]:
        checker.add(record)
    problems = checker.finish(known=known).problems
    assert {(p.run, p.subject) for p in problems} == {_chain(record) for record in LOG[kept:]}


def test_the_end_of_a_chain_is_held_by_the_checkpoint_and_by_the_next_run() -> None:
    cut = [record for record in LOG if not record.message_id.startswith("aaaa.4.acme")]
    (found,) = check(renumbered(cut)).problems[:1]
    assert (found.subject, found.block) == (INFERENCE, 3)
    assert "block 4 is missing at its end" in found.what


def test_a_chain_that_is_gone_altogether_is_found() -> None:
    found = check(renumbered([record for record in LOG if record.subject != ACCESS])).problems
    assert {problem.subject for problem in found} == {ACCESS}
    assert "the whole chain is missing" in found[0].what


def test_a_run_whose_every_trace_is_gone_is_found_by_the_run_after_it() -> None:
    found = check(renumbered([record for record in LOG if not record.message_id.startswith("aaaa")])).problems
    assert {problem.run for problem in found} == {"aaaa"}
    assert {problem.subject for problem in found} == {INFERENCE, ACCESS, CHECKPOINTS}


def test_checkpoints_that_are_gone_are_found() -> None:
    kept = [record for record in LOG if record.subject != CHECKPOINTS]
    assert {problem.what for problem in check(renumbered(kept)).problems} == {"every checkpoint of this run is missing"}


def long_log() -> list[Record]:
    """Ten hours: a block and a checkpoint every minute."""
    records: list[Record] = []
    writer = Writer("aaaa", records, now=NOW - 10 * HOUR)
    writer.say(What.BEGIN)
    for minute in range(600):
        writer.now = NOW - 10 * HOUR + minute * audit.ALIVE_MS
        if minute % 70 == 0:
            writer.entries(ACCESS)
        writer.entries(INFERENCE)
        writer.checkpoint()
    writer.say(What.END)
    return records


def kept_since(records: list[Record], at: int) -> list[Record]:
    return [record for record in records if record.stored_at >= at]


ALWAYS = Historical([msgspec.structs.replace(KEYS, identities=(GATEWAY.record(not_before=0, expires_at=NOW + DAY),))])


def test_what_is_older_than_the_retention_may_be_missing() -> None:
    records = long_log()
    kept = kept_since(records, records[-1].stored_at - 5 * HOUR)
    assert check(kept, retention_ms=5 * HOUR, keys=ALWAYS).problems == ()


@pytest.mark.parametrize("hours", [1, 3, 4])
def test_what_is_not_older_may_not(hours: int) -> None:
    records = long_log()
    kept = kept_since(records, records[-1].stored_at - hours * HOUR)
    found = check(kept, retention_ms=5 * HOUR, keys=ALWAYS).problems
    assert found
    assert {CHECKPOINTS} <= {problem.subject for problem in found}


def test_one_chain_cannot_be_taken_out_under_cover_of_the_retention() -> None:
    records = long_log()
    kept = kept_since(records, records[-1].stored_at - 5 * HOUR)
    gone = [record for record in kept if record.subject != ACCESS or record.stored_at > NOW - HOUR]
    found = check(renumbered(gone), retention_ms=5 * HOUR, keys=ALWAYS).problems
    assert {problem.subject for problem in found} == {ACCESS}


def test_keys_that_expired_or_were_revoked_since_still_count_for_what_they_signed() -> None:
    revoked = crypto.Revocation(GATEWAY.kid, "gateway", LOG[5].stored_at + 1 - 10_000)
    later = msgspec.structs.replace(KEYS, version=2, identities=(), revoked=(revoked,))
    found = check(LOG, keys=Historical([KEYS, later]))
    assert {problem.sequence for problem in found.problems if problem.sequence} >= set(range(7, len(LOG) + 1))
    assert all("revoked" in problem.what for problem in found.problems if problem.sequence)


def test_a_block_stored_long_after_its_key_was_revoked_is_worth_a_look() -> None:
    revoked = crypto.Revocation(GATEWAY.kid, "gateway", LOG[-1].stored_at + 1)
    keys = Historical([msgspec.structs.replace(KEYS, revoked=(revoked,))])
    late = [*LOG[:-1], msgspec.structs.replace(LOG[-1], stored_at=NOW + DAY)]
    found = check(late, keys=keys)
    assert found.problems == ()
    assert found.notes == (f"message {len(LOG)}: stored after the key of 'gateway' was revoked",)


def test_a_worker_cannot_write_the_log_and_nobody_another_ones_run() -> None:
    records = [*LOG]
    Writer("cccc", records, now=NOW + 500, who=WORKER).entries(INFERENCE)
    stranger = crypto.new_identity("modelstore", Role.MODELSTORE)
    known = msgspec.structs.replace(
        KEYS, identities=(*KEYS.identities, stranger.record(not_before=NOW, expires_at=NOW + DAY))
    )
    Writer("bbbb", records, now=NOW + 600, who=stranger, chains={INFERENCE: Chain("bbbb", INFERENCE)}).entries(
        INFERENCE
    )
    by_sequence = {problem.sequence: problem.what for problem in check(records, keys=Historical([known])).problems}
    assert by_sequence == {
        len(LOG) + 1: "it is signed, but is not a block of an audit log",
        len(LOG) + 2: "the run belongs to 'gateway'",
    }


def test_stored_frames_are_verified_as_of_when_they_were_signed() -> None:
    frame, subject = LOG[0].frame, LOG[0].subject
    keys = Historical([KEYS])
    assert keys.open(frame, subject=subject, types=(MessageType.AUDIT,)).sender == "gateway"
    with pytest.raises(SubjectMismatch):
        keys.open(frame, subject=ACCESS, types=(MessageType.AUDIT,))
    with pytest.raises(RoleNotAllowed):
        keys.open(frame, subject=subject, types=(MessageType.INFER,))
    short = GATEWAY.record(not_before=NOW - 2 * DAY, expires_at=NOW - DAY)
    with pytest.raises(KeyExpired):
        Historical([msgspec.structs.replace(KEYS, identities=(short,))]).header(frame)
    gone = crypto.Revocation(GATEWAY.kid, "gateway", NOW - 10_000)
    with pytest.raises(KeyRevoked):
        Historical([msgspec.structs.replace(KEYS, revoked=(gone,))]).header(frame)


def test_entries_keep_their_fields_and_cost_nothing_for_what_is_not_said() -> None:
    row = (NOW, "key:abcdefgh", "infer", "ok", "digits", 3, "0" * 32, "req", 256, 40, 900, 1, "", "")
    chain = Chain("aaaa", INFERENCE)
    block = audit.decode_block(chain.block([audit.encode(row), audit.encode((NOW, "-", "log in", "unauthenticated"))]))
    one, two = audit.entries_of(block, AuditEntry)
    assert one == AuditEntry(*row)
    assert two == AuditEntry(NOW, "-", "log in", "unauthenticated")
    assert len(block.entries[1]) < 40


def test_a_text_of_a_client_is_kept_short_printable_and_without_secrets() -> None:
    text = "tk_abcdefgh_" + "S" * 43
    assert audit.clean(f"/v1/keys/{text}") == "/v1/keys/tk_abcdefgh_..."
    assert audit.clean("Bearer ts_" + "aB3-" * 30 + "." + "x" * 86) == "Bearer ts_..."
    assert audit.clean("outputs_of_tests") == "outputs_of_tests"
    assert audit.clean("a\nb\x00ü") == r"a\nb\x00\xfc"
    assert len(audit.clean("x" * 5000)) == 200
    assert len(audit.clean("\n" * 5000)) == 200


def test_records_in_a_file_come_back_and_damage_is_said() -> None:
    content = b"".join(audit.write_record(record) for record in LOG)
    assert [record for record, _ in audit.read_records(io.BytesIO(content))] == LOG
    torn = list(audit.read_records(io.BytesIO(content[:-1])))
    assert [record for record, _ in torn] == LOG[:-1]
    assert torn[-1][1] == len(content) - len(audit.write_record(LOG[-1]))
    for damage in (b"\xff" + content[1:], content[:4] + b"\xc1" + content[5:]):
        with pytest.raises(BadEncoding, match="byte 0"):
            list(audit.read_records(io.BytesIO(damage)))


DAMAGE: dict[str, Callable[[audit.Block], object]] = {
    "no entries": lambda block: msgspec.structs.replace(block, entries=(), marks=b""),
    "marks short": lambda block: msgspec.structs.replace(block, marks=block.marks[1:]),
    "number 0": lambda block: msgspec.structs.replace(block, number=0),
    "text": lambda _: "block",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_no_block_is_not_read_as_one(how: str) -> None:
    block = audit.decode_block(Chain("aaaa", INFERENCE).block([b"x"]))
    with pytest.raises(BadEncoding):
        audit.decode_block(codec.pack(msgspec.to_builtins(DAMAGE[how](block), builtin_types=(bytes,))))


def test_a_problem_names_message_chain_block_and_entry() -> None:
    problem = Problem("this entry was altered", 12, INFERENCE, "gateway", "aaaa", 3, 7)
    assert problem.line() == f"message 12, {INFERENCE}, gateway run aaaa, block 3, entry 7: this entry was altered"
    assert Problem("it is empty").line() == "log: it is empty"


def test_every_kind_is_one_token_of_a_subject() -> None:
    assert all(kind.value.isalpha() for kind in Kind)
