"""Frames on the pipes between a worker and a model's process: a big-endian u32 length, then the content."""

from __future__ import annotations

import math
import os
import select
import struct
import threading
import time
from collections.abc import Callable

LARGEST_FRAME = 1 << 30
_LENGTH = struct.Struct(">I")
_LOOK_S = 0.2
"""Seconds between two checks for ``closed``."""


def write_frame(descriptor: int, content: bytes, end: float, closed: threading.Event | None = None) -> None:
    """Write one frame before the monotonic time ``end``, unless ``closed`` is set.

    Raises:
        TimeoutError: the reader did not take it in time, or ``closed`` was set.
        OSError: the reader is gone.
        ValueError: the frame is too large.
    """
    if len(content) > LARGEST_FRAME:
        raise ValueError("frame too large")
    os.set_blocking(descriptor, False)
    for part in (_LENGTH.pack(len(content)), content):
        rest = memoryview(part)
        while rest:
            _wait(descriptor, select.POLLOUT, end, closed)
            try:
                rest = rest[os.write(descriptor, rest[: 1 << 20]) :]
            except BlockingIOError:
                continue


def read_frame(
    descriptor: int,
    end: float,
    closed: threading.Event | None = None,
    look: Callable[[], None] | None = None,
) -> bytes:
    """Read one frame before the monotonic time ``end``, unless ``closed`` is set; call ``look`` periodically.

    Raises:
        TimeoutError: it did not arrive in time, or ``closed`` was set.
        EOFError: the writer is gone.
        ValueError: its length is too large.
    """
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size, end, closed, look))
    if length > LARGEST_FRAME:
        raise ValueError("frame too large")
    return _read(descriptor, length, end, closed)


def _read(
    descriptor: int,
    length: int,
    end: float,
    closed: threading.Event | None,
    look: Callable[[], None] | None = None,
) -> bytes:
    found = bytearray()
    while len(found) < length:
        _wait(descriptor, select.POLLIN, end, closed, look)
        part = os.read(descriptor, min(length - len(found), 1 << 20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _wait(
    descriptor: int,
    event: int,
    end: float,
    closed: threading.Event | None,
    look: Callable[[], None] | None = None,
) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    while (left := end - time.monotonic()) > 0:
        if closed is not None and closed.is_set():
            raise EOFError
        if closed is None and left == math.inf:
            poll.poll()
            return
        if poll.poll(min(left, _LOOK_S) * 1000):
            return
        if look is not None:
            look()
    raise TimeoutError
