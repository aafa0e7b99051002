"""Tests that run side by side in several processes, and some that run while no other does.

Every test holds a lock that many may hold; one marked ``alone`` holds it by itself. Whoever waits for that keeps the turn, so
that others do not come in before it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def place(locks: Path, *, alone: bool) -> Iterator[None]:
    """Wait until a test may run, and hold its place while it does."""
    turn, running = (os.open(locks / name, os.O_RDWR | os.O_CREAT) for name in ("turn", "running"))
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
    finally:
        os.close(turn)
        os.close(running)
