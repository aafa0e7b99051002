"""Verifies that a log is complete: every block signed by its writer, in its place, and none missing.

A chain shows altered, moved, repeated and removed blocks in its middle. Blocks removed from its end, and
whole missing chains, show in the checkpoints: each lists the blocks that its writer's run wrote since the
previous one, and a run begins with a list of the previous run's chain ends. Only blocks older than the
retention may be missing, and the checkpoints say which those are.

A broker that does not sync before it acknowledges loses its last blocks in a power cut. The next run of their
writer records that (``CUT``), and the missing ends of the previous run are then a note and not a problem, as
long as they can be such an end: nothing later of that run is there, and the missing part spans no more than a
minute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from tether.audit.chain import Block, decode_block, entries_of, first_unfit, genesis, marks_of, parse_message_id
from tether.audit.entries import Kind, Mark, What
from tether.audit.records import Record
from tether.crypto import Header, Historical, MessageType, body_of, kid_of
from tether.errors import BadEncoding, EnvelopeError

ALIVE_MS = 60_000
"""A writer with nothing to list writes a checkpoint at least this often."""

_SLACK_MS = 2 * ALIVE_MS
_SILENT_MS = 3 * ALIVE_MS
_CUT_MS = 2_000
"""Maximum reordering of one run's blocks between writing and storing."""

ChainKey = tuple[str, str]
"""Run and subject."""


class Problem(msgspec.Struct, frozen=True):
    """One problem. ``sequence`` is the stream's; 0 and empty fields are unknown or do not apply."""

    what: str
    sequence: int = 0
    subject: str = ""
    writer: str = ""
    run: str = ""
    block: int = 0
    entry: int = 0

    def line(self) -> str:
        named = [
            f"message {self.sequence}" if self.sequence else "",
            self.subject,
            f"{self.writer} run {self.run}" if self.run else self.writer,
            f"block {self.block}" if self.block else "",
            f"entry {self.entry}" if self.entry else "",
        ]
        return f"{', '.join(filter(None, named)) or 'log'}: {self.what}"


class VerificationReport(msgspec.Struct, frozen=True):
    """Result of a verification. ``notes`` deserve attention but prove no loss."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    blocks: int
    entries: int
    writers: tuple[str, ...]
    first_at: int
    last_at: int


@dataclass
class _ChainState:
    """State of one chain. ``head`` is empty after an unreadable block."""

    writer: str
    first: int
    first_at: int
    number: int = 0
    head: bytes = b""
    since: int = 0
    """Lowest block listed in an existing checkpoint."""


@dataclass
class _Run:
    writer: str
    last_at: int
    closed: bool = False


class _Place(NamedTuple):
    """A message and its header: signer, block of which run, and time."""

    record: Record
    writer: str = ""
    run: str = ""
    number: int = 0
    at: int = 0


@dataclass
class Checker:
    """Verifies blocks in stream order. ``whole``: the stream's sequence has no gaps of its own."""

    historical: Historical
    retention_ms: int
    whole: bool = True
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _chains: dict[ChainKey, _ChainState] = field(default_factory=dict)
    _runs: dict[str, _Run] = field(default_factory=dict)
    _open: list[tuple[str, Mark]] = field(default_factory=list)
    _cuts: dict[str, tuple[str, Mark]] = field(default_factory=dict)
    """By run: the writer that reports the loss of its end, and the row that does."""
    _blocks: int = 0
    _entries: int = 0
    _sequence: int = 0
    _first_at: int = 0
    _last_at: int = 0

    def add(self, record: Record) -> Block | None:
        """Verify the next block; return it if it is valid."""
        self._in_sequence(record)
        try:
            header, identity = self.historical.header(record.frame)
        except EnvelopeError as error:
            self._say(error.message, _Place(record))
            return None
        named = parse_message_id(header.message_id)
        if header.type is not MessageType.AUDIT or header.type not in identity.types or named is None:
            self._say("it is signed, but is not a block of an audit log", _Place(record, identity.name))
            return None
        place = _Place(record, identity.name, *named, header.issued_at)
        if header.subject != record.subject:
            self._say(f"it was signed for {header.subject} and moved here", place)
            return None
        block = self._opened(place, header)
        if not self._placed(place, block):
            return None
        self._late(place)
        if block is not None:
            self._count(place, block)
        return block

    def _say(self, what: str, place: _Place, entry: int = 0) -> None:
        record, writer, run, number, _ = place
        self.problems.append(Problem(what, record.sequence, record.subject, writer, run, number, entry))

    def _in_sequence(self, record: Record) -> None:
        before, here = self._sequence, record.sequence
        if not self.whole or not here:
            return
        if before and here > before + 1:
            self._say(f"messages {before + 1} to {here - 1} are missing before it", _Place(record))
        elif here <= before:
            self._say(f"it stands after message {before}", _Place(record))
        self._sequence = max(before, here)

    def _opened(self, place: _Place, header: Header) -> Block | None:
        """Return the block of a frame with a valid header; None, with a problem that locates the entry, if
        the body is invalid.
        """
        body = body_of(place.record.frame)
        genuine = len(body) == header.body_length and hashlib.sha256(body).digest() == header.body_digest
        try:
            block = decode_block(body)
        except BadEncoding:
            self._say("the block was altered: it cannot be read", place)
            return None
        entry = first_unfit(block)
        if not genuine or entry is not None:
            self._say("the block was altered" if entry is None else "this entry was altered", place, entry or 0)
            return None
        if (block.run, block.number) != (place.run, place.number) or marks_of(block)[1] != block.head:
            self._say("the block is not the one that its header names", place)
            return None
        return block

    def _placed(self, place: _Place, block: Block | None) -> bool:
        """Return whether the block follows its predecessor in the chain; a gap is reported and skipped."""
        record, writer, name, number, at = place
        seen = self._chains.get((name, record.subject))
        run = self._runs.setdefault(name, _Run(writer, at))
        if run.writer != writer:
            self._say(f"the run belongs to '{run.writer}'", place)
            return False
        if seen is None:
            seen = self._chains[name, record.subject] = _ChainState(writer, number, at)
            before = genesis(name, record.subject) if number == 1 else b""
        elif number <= seen.number:
            if record.sequence:
                self._say(f"it stands after block {seen.number}: repeated or moved", place)
            return False
        else:
            before = seen.head if number == seen.number + 1 else b""
            if number > seen.number + 1:
                self._say(f"{_span(seen.number + 1, number - 1)} missing before it", place)
        if block is not None and before and block.previous != before:
            self._say("it does not follow from the block before it", place)
        seen.number, seen.head = number, b"" if block is None else block.head
        run.last_at = max(run.last_at, at)
        return True

    def _late(self, place: _Place) -> None:
        """Check the storage time: a thief of a key can backdate messages, but not their storage in the stream."""
        gone = self.historical.revoked.get(kid_of(place.record.frame), 0)
        if gone and place.record.stored_at > gone + _SLACK_MS:
            what = f"stored after the key of '{place.writer}' was revoked"
            self.notes.append(f"message {place.record.sequence}: {what}")
        self._first_at = min(self._first_at or place.at, place.at)
        self._last_at = max(self._last_at, place.at)

    def _count(self, place: _Place, block: Block) -> None:
        self._blocks += 1
        self._entries += len(block.entries)
        if not _is_checkpoint(place.record.subject):
            return
        try:
            marks = entries_of(block, Mark)
        except BadEncoding:
            self._say("the checkpoint cannot be read", place)
            return
        for mark in marks:
            self._listed(place.writer, block.run, mark)

    def _listed(self, writer: str, run: str, mark: Mark) -> None:
        if mark.what is What.END:
            self._runs[run].closed = True
        elif mark.what is What.LOST:
            self.notes.append(f"{writer} had no room for {mark.number} entries before {mark.at}")
        elif mark.what is What.PREVIOUS and mark.run in self._runs:
            self._runs[mark.run].closed = True
        elif mark.what is What.CUT:
            self._cuts[mark.run] = writer, mark
        if mark.what not in (What.HEAD, What.PREVIOUS):
            return
        seen = self._chains.get((mark.run, mark.subject))
        if seen is not None and mark.what is What.HEAD:
            seen.since = min(seen.since or mark.since, mark.since)
        if not _satisfied(seen, mark):
            self._open.append((writer, mark))

    def finish(self, *, now_ms: int = 0, known: Iterable[Mark] = ()) -> VerificationReport:
        """Return the report. ``known`` are heads from elsewhere, such as the writers' own files; ``now_ms``
        0: the newest block.
        """
        now = now_ms or self._last_at
        limit = now - self.retention_ms + _SLACK_MS
        fresh = [(writer, mark) for writer, mark in self._open if mark.at > limit]
        fresh += [("", mark) for mark in known if mark.at > limit]
        told = {self._untold(writer, mark) for writer, mark in fresh}
        for (run, subject), seen in self._chains.items():
            if seen.first > 1 and (run, subject) not in told and not self._expired(run, subject, seen, limit):
                gone = _span(1, seen.first - 1)
                self.problems.append(Problem(f"{gone} missing at its beginning", 0, subject, seen.writer, run))
        self._check_runs(now, limit)
        problems = tuple(dict.fromkeys(self.problems))
        writers = tuple(sorted({run.writer for run in self._runs.values()}))
        notes = tuple(self.notes)
        return VerificationReport(problems, notes, self._blocks, self._entries, writers, self._first_at, self._last_at)

    def _untold(self, writer: str, mark: Mark) -> ChainKey:
        """Report missing blocks of a listed chain."""
        key = (mark.run, mark.subject)
        seen = self._chains.get(key)
        for what, block in _missing(seen, mark):
            by = writer or (seen.writer if seen else "")
            if (seen is None or mark.number > seen.number) and self._was_cut(by, mark):
                self.notes.append(_lost_end(by, mark, seen, self._runs.get(mark.run)))
                return key
            self.problems.append(Problem(what, 0, mark.subject, by, mark.run, block))
        return key

    def _was_cut(self, writer: str, mark: Mark) -> bool:
        """Return whether the missing end of a chain can be a power cut's loss, reported by its writer."""
        said_by, _ = self._cuts.get(mark.run, ("", mark))
        run = self._runs.get(mark.run)
        if not said_by or said_by != writer or run is None or run.writer != writer:
            return False
        return -_CUT_MS <= mark.at - run.last_at <= ALIVE_MS + _CUT_MS

    def _expired(self, run: str, subject: str, seen: _ChainState, limit: int) -> bool:
        """Return whether the missing beginning of a chain is older than the retention."""
        if seen.first_at <= limit:
            return True
        if any((mark.run, mark.subject) == (run, subject) and mark.number >= seen.first - 1 for _, mark in self._open):
            return True
        checkpoints = self._checkpoints(run)
        if checkpoints is None or checkpoints is seen:
            return False
        return checkpoints.first > 1 and checkpoints.first_at <= limit and not 0 < seen.since < seen.first

    def _checkpoints(self, run: str) -> _ChainState | None:
        found = (seen for (of, subject), seen in self._chains.items() if of == run and _is_checkpoint(subject))
        return next(found, None)

    def _check_runs(self, now: int, limit: int) -> None:
        for name, run in self._runs.items():
            if self._checkpoints(name) is None and run.last_at > limit:
                self.problems.append(Problem("every checkpoint of this run is missing", 0, "", run.writer, name))
            elif not run.closed and now - run.last_at > _SILENT_MS:
                silent = (now - run.last_at) // 1000
                self.notes.append(f"{run.writer} run {name} last wrote {silent} s ago and did not record its end")


def _is_checkpoint(subject: str) -> bool:
    return subject.endswith(f".{Kind.CHECKPOINT}")


def _span(first: int, last: int) -> str:
    return f"block {first} is" if first == last else f"blocks {first} to {last} are"


def _lost_end(writer: str, mark: Mark, seen: _ChainState | None, run: _Run | None) -> str:
    first = seen.number + 1 if seen else 1
    since = run.last_at if run else 0
    return (
        f"{mark.subject}, {writer} run {mark.run}: {_span(first, mark.number)} lost at its end, of "
        f"{since} to {mark.at}: {writer} had "
        "written it, and found it missing at its restart, as after a power cut. Without a power cut it was removed"
    )


def _satisfied(seen: _ChainState | None, mark: Mark) -> bool:
    return not any(True for _ in _missing(seen, mark))


def _missing(seen: _ChainState | None, mark: Mark) -> Iterator[tuple[str, int]]:
    """Return the problem with a mark, and the block concerned."""
    if seen is None:
        yield f"the whole chain is missing: a checkpoint lists {mark.number} blocks", 0
        return
    if mark.number > seen.number:
        yield f"{_span(seen.number + 1, mark.number)} missing at its end: a checkpoint lists {mark.number}", seen.number
    if mark.what is What.HEAD and mark.since < seen.first:
        yield f"{_span(mark.since, seen.first - 1)} missing at its beginning: a checkpoint lists them", mark.since
    if mark.number == seen.number and seen.head and mark.head != seen.head:
        yield "it is not the block that a checkpoint lists", mark.number
