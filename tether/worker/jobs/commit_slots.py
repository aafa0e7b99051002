"""Limits the runs whose outcomes are not delivered yet, so that a slow broker delays new runs only.

The outcomes of a run are delivered after the run has released its instance. A few runs may be delivering at a
time; beyond that no run begins. Durable runs that deliver for longer than :data:`QUICK_S` (results are full,
or their stream is unavailable) are counted apart: with :data:`SLOW_RUNS` of these no further durable job
begins, while synchronous jobs are still served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = 8
"""Runs that may deliver their outcomes in addition to one for each instance."""

QUICK_S = 1.0
"""Seconds after which a durable run that still delivers counts as slow."""

SLOW_RUNS = 32
"""Slow durable runs at which no further durable job begins."""


class CommitSlots:
    """Counts the runs of one version that deliver outcomes; calls ``changed`` when another run may fit."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._quick = 0
        self._slow = 0

    def full(self, copies: int) -> bool:
        """Return True if a version with ``copies`` instances must begin no further run."""
        return self._quick >= copies + ENDING

    @property
    def durable_full(self) -> bool:
        """Return True if no further run of durable jobs may begin."""
        return self._slow >= SLOW_RUNS

    def expect(self) -> None:
        """Count a run that begins."""
        self._quick += 1

    @contextmanager
    def sending(self, *, durable: bool) -> Iterator[None]:
        """Count an expected run as delivering while the block runs."""
        slow = False

        def slow_now() -> None:
            nonlocal slow
            slow = True
            self._quick -= 1
            self._slow += 1
            self._changed()

        timer = asyncio.get_running_loop().call_later(QUICK_S, slow_now) if durable else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            if slow:
                self._slow -= 1
            else:
                self._quick -= 1
            self._changed()
