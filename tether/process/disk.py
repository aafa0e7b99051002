"""Checks a file system for free space and whether it accepts files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MB = 1 << 20
SMALLEST_RESERVE_MB = 16
"""Two of nats-server's message blocks: it needs the space of one to clear another."""

SHARE = 16
"""A reserve is at most 1/16 of its file system, so that a small one stays usable."""

FEWEST_INODES = 64
_PROBE_BYTES = 4096


class Room(NamedTuple):
    """Size and free space of a file system in bytes. ``inodes`` is None if their number is not fixed."""

    free: int
    total: int
    inodes: int | None = None
    read_only: bool = False


def look(folder: Path) -> Room | None:
    """Return the space of the file system of ``folder``; None if it cannot be read."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    inodes = found.f_favail if found.f_files else None
    read_only = bool(found.f_flag & os.ST_RDONLY)
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, inodes, read_only)


def reserve(room: Room, reserve_mb: int) -> int:
    """Return the bytes to leave free for a setting of ``reserve_mb`` megabytes."""
    return min(reserve_mb * MB, max(room.total // SHARE, SMALLEST_RESERVE_MB * MB))


def shortage(room: Room, reserve_mb: int, *, more: float = 1.0) -> str:
    """Return why nothing large should be written, as text for an operator; empty if there is space.

    ``more``: multiple of the reserve that must be free. Use more than 1 to end a refusal, or the next write
    starts it again.
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
    """Return why the system refuses a file in ``folder``; empty if one could be written. Blocks.

    It detects quotas and missing permissions too.
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
        return  # a file system that has become read-only stores nothing of it either
