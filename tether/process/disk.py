"""How much room a file system has, and whether it takes files at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MB = 1 << 20
SMALLEST_RESERVE_MB = 16
"""Two of nats-server's message blocks: it needs room for one to clear another."""

SHARE = 16
"""A reserve is at most this part of its file system, so that a small one is not all reserve."""

FEWEST_INODES = 64
_PROBE_BYTES = 4096


class Room(NamedTuple):
    """What a file system says of itself, in bytes. ``inodes`` is None where it has no fixed number of them."""

    free: int
    total: int
    inodes: int | None = None
    read_only: bool = False


def look(folder: Path) -> Room | None:
    """The room of the file system that holds ``folder``; None when it cannot be looked at."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    inodes = found.f_favail if found.f_files else None
    read_only = bool(found.f_flag & os.ST_RDONLY)
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, inodes, read_only)


def reserve(room: Room, reserve_mb: int) -> int:
    """Bytes to leave free when a setting asks for ``reserve_mb`` megabytes."""
    return min(reserve_mb * MB, max(room.total // SHARE, SMALLEST_RESERVE_MB * MB))


def shortage(room: Room, reserve_mb: int, *, more: float = 1.0) -> str:
    """Why nothing large should be written any more, in words for an operator; empty when there is room.

    ``more``: how many times the reserve must be free. Ask for more than once the reserve before a refusal ends, or it
    begins again with the next write.
    """
    if room.read_only:
        return "is mounted read-only"
    if room.inodes is not None and room.inodes < FEWEST_INODES * more:
        return f"has {room.inodes} free inodes left"
    kept = reserve(room, reserve_mb)
    if room.free < kept * more:
        return f"has {room.free // MB} of {room.total // MB} MB free, and {kept // MB} MB are kept in reserve"
    return ""


def refusal(folder: Path) -> str:
    """Why ``folder`` takes no file, as the system says; empty when one could be written. Blocks.

    A quota or a missing permission shows only here.
    """
    path = folder / f".room-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return (error.strerror or str(error)).lower()
    finally:
        _forget(path)
    return ""


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a file system that is read-only by now keeps nothing of it either
