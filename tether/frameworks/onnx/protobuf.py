"""Reads protobuf's wire format: fields by number and place in the buffer, without generated code or copies."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Buffer = bytes | mmap.mmap


class NotProtobuf(ValueError):
    """The bytes are not a protobuf message, or one with too many fields."""


class TooManyFields(NotProtobuf):
    """The message has too many fields."""


class CutOff(NotProtobuf):
    """A message ends before one of its fields does."""


class Field(NamedTuple):
    """One field: number, wire type, its varint value or length-delimited range."""

    number: int
    kind: int
    value: int
    start: int
    end: int


class Reader:
    """Reads fields of a buffer, at most ``most`` of them in all.

    Every method raises :class:`NotProtobuf`.
    """

    def __init__(self, data: Buffer, most: int) -> None:
        self.data = data
        self._most = most
        self._fields = 0

    def fields(self, position: int, end: int) -> Iterator[Field]:
        """Return the fields of the message between two places."""
        while position < end:
            self._fields += 1
            if self._fields > self._most:
                raise TooManyFields(f"more than {self._most} fields")
            tag, position = self.varint(position, end)
            number, kind = tag >> 3, tag & 7
            # A parser that truncates a longer tag to 32 bits would see another field.
            if number == 0 or tag >= 1 << 32:
                raise NotProtobuf("a tag that is none")
            value, start, position = self._payload(kind, position, end)
            yield Field(number, kind, value, start, position)

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """Return an unsigned number and the place after it."""
        value = shift = 0
        while True:
            if position >= end:
                raise CutOff("a number without an end")
            if shift > 63:
                raise NotProtobuf("a number without an end")
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7

    def bytes_of(self, field: Field, most: int) -> bytes:
        """Copy the first ``most`` bytes of a length-delimited field."""
        return bytes(self.data[field.start : min(field.end, field.start + most)])

    def varints(self, field: Field) -> Iterator[int]:
        """Return the numbers of one occurrence of a repeated field, packed or not."""
        if field.kind == VARINT:
            yield field.value
        elif field.kind == BYTES:
            position = field.start
            while position < field.end:
                value, position = self.varint(position, field.end)
                yield value

    def _payload(self, kind: int, position: int, end: int) -> tuple[int, int, int]:
        if kind == VARINT:
            value, after = self.varint(position, end)
            return value, position, after
        if kind == BYTES:
            length, start = self.varint(position, end)
        elif kind in (FIXED64, FIXED32):
            length, start = (8 if kind == FIXED64 else 4), position
        else:
            raise NotProtobuf("a wire type that is none")
        if start + length > end:
            raise CutOff("a field that ends beyond its message")
        return 0, start, start + length


def signed(value: int) -> int:
    """Interpret a varint as 64-bit two's complement, as for ``int64`` and ``int32``."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
