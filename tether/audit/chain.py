"""Chains entries by hash: each in its block's chain, each block in the chain of its writer's run and subject.

::

    body  = [run, number, previous head 32, entry number, [entry ...], marks, head 32]
    head  = SHA-256(previous head | entry), for every entry; the first previous head is SHA-256(DOMAIN | run |
subject)
    marks = the first 8 bytes of the head after each entry

The head proves the block; the marks locate the damaged entry of a damaged block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from tether.errors import BadEncoding
from tether.wire import codec

DOMAIN = b"tether/audit/v1\0"
BLOCK_ENTRIES = 256
"""Maximum entries per block: encoding takes less than a millisecond of the event loop."""

MARK_BYTES = 8

T = TypeVar("T")


class Block(msgspec.Struct, frozen=True, array_like=True):
    """A decoded body. ``number`` counts the blocks of a chain from 1, ``first`` its entries from 1."""

    run: str
    number: int
    previous: bytes
    first: int
    entries: tuple[bytes, ...]
    marks: bytes
    head: bytes


def genesis(run: str, subject: str) -> bytes:
    """Return the head before the first entry of a chain."""
    return hashlib.sha256(DOMAIN + f"{run}\0{subject}".encode()).digest()


class Chain:
    """One chain as its writer extends it."""

    __slots__ = ("entries", "head", "listed", "number", "run", "subject")

    def __init__(self, run: str, subject: str) -> None:
        self.run = run
        self.subject = subject
        self.number = 0
        self.entries = 0
        self.head = genesis(run, subject)
        self.listed = 0
        """The last block listed in a checkpoint."""

    def block(self, entries: Sequence[bytes]) -> bytes:
        """Return the body of the next block, which becomes the end of the chain."""
        previous = head = self.head
        marks = bytearray()
        for entry in entries:
            head = hashlib.sha256(head + entry).digest()
            marks += head[:MARK_BYTES]
        self.number += 1
        body = codec.pack((self.run, self.number, previous, self.entries + 1, entries, bytes(marks), head))
        self.entries += len(entries)
        self.head = head
        return body


def message_id(run: str, number: int, subject: str) -> str:
    """Return the signed name of a chain's block; it is unique."""
    tenant, kind = subject.split(".")[-2:]
    return f"{run}.{number}.{tenant}.{kind}"


def parse_message_id(text: str) -> tuple[str, int] | None:
    """Return run and number from :func:`message_id`, or None."""
    run, _, rest = text.partition(".")
    number = rest.partition(".")[0]
    return (run, int(number)) if run and number.isascii() and number.isdigit() else None


def decode_block(body: bytes) -> Block:
    """Decode a block of :meth:`Chain.block`.

    Raises:
        BadEncoding: it does not have that form.
    """
    block: Block = _converted(body, Block)
    if len(block.marks) != MARK_BYTES * len(block.entries) or not block.entries or block.number < 1:
        raise BadEncoding("an audit block whose entries and marks do not fit each other")
    return block


def entries_of(block: Block, kind: type[T]) -> list[T]:
    """Return the block's entries as values.

    Raises:
        BadEncoding: one does not have the form of ``kind``.
    """
    return [_converted(entry, kind) for entry in block.entries]


def marks_of(block: Block) -> tuple[bytes, bytes]:
    """Compute marks and head from the previous head and the entries."""
    head, marks = block.previous, bytearray()
    for entry in block.entries:
        head = hashlib.sha256(head + entry).digest()
        marks += head[:MARK_BYTES]
    return bytes(marks), head


def first_unfit(block: Block) -> int | None:
    """Return the number, within its chain, of the first entry that does not match its mark; None if all do."""
    marks, _ = marks_of(block)
    for index in range(len(block.entries)):
        part = slice(index * MARK_BYTES, (index + 1) * MARK_BYTES)
        if marks[part] != block.marks[part]:
            return block.first + index
    return None


def _converted(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.convert(codec.unpack(data), kind, strict=True)
    except msgspec.ValidationError as error:
        raise BadEncoding(f"an audit entry does not have the expected form: {error}"[:200], raw=data) from error
