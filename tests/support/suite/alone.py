"""Tests that run side by side in several processes, and some that run while no other does.

Every test holds a lock that many may hold; one that is to be alone holds it by itself. Whoever waits for that keeps the turn, so
that others do not come in before it; when the next test of a process is to be alone too, it keeps the lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Places:
    """The places of one process's tests, one after another; ``locks`` is a folder that all processes share."""

    def __init__(self, locks: Path) -> None:
        self._locks = locks
        self._kept: int | None = None

    @contextmanager
    def place(self, *, alone: bool, then_alone: bool) -> Iterator[None]:
        """Wait until a test may run, and hold its place while it does; ``then_alone``: the next one is to be alone."""
        kept, self._kept = self._kept, None
        if kept is not None and not alone:
            os.close(kept)
            kept = None
        place = self._enter(fcntl.LOCK_EX if alone else fcntl.LOCK_SH) if kept is None else kept
        try:
            yield
        finally:
            if alone and then_alone:
                self._kept = place
            else:
                os.close(place)

    def _enter(self, kind: int) -> int:
        turn, running = (os.open(self._locks / name, os.O_RDWR | os.O_CREAT) for name in ("turn", "running"))
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(running, kind)
        finally:
            os.close(turn)
        return running
