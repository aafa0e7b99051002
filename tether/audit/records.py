"""Reads and writes blocks in a file, the common form of a writer's spool and an export.

A record is its length (4 bytes, big-endian) and a msgpack array of the fields of :class:`Record`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from tether.errors import BadEncoding
from tether.wire import codec

_LENGTH = struct.Struct(">I")
LONGEST = 64 << 20
"""Maximum message size: a greater length means damage."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A block as stored. ``sequence`` and ``stored_at`` (UTC milliseconds) are the stream's; 0: not yet
    stored there.
    """

    sequence: int
    subject: str
    stored_at: int
    message_id: str
    frame: bytes


def write_record(record: Record) -> bytes:
    body = codec.pack((record.sequence, record.subject, record.stored_at, record.message_id, record.frame))
    return _LENGTH.pack(len(body)) + body


def read_records(file: BinaryIO) -> Iterator[tuple[Record, int]]:
    """Return every record from the file's position on, each with the position after it; a torn last one ends it.

    Raises:
        BadEncoding: what is there is no record; the message says at which byte.
    """
    position = file.tell()
    while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        if length > LONGEST:
            raise BadEncoding(f"byte {position}: {length} is not the length of a record")
        body = file.read(length)
        if len(body) < length:
            return
        try:
            record = msgspec.convert(codec.unpack(body), Record, strict=True)
        except (BadEncoding, msgspec.ValidationError) as error:
            raise BadEncoding(f"byte {position}: not a record") from error
        position += _LENGTH.size + length
        yield record, position
