"""How many runs may have ends on their way to the broker, so that a store which takes none stops neither runs nor callers.

The end of a run is sent after the run has given back its copy of the model. A few may be on their way at a time: that holds
the next runs back when the broker is slow. Ends of durable jobs that take longer than :data:`QUICK_S` wait beside those:
results have no room, or their stream is away. When :data:`SLOW_RUNS` wait so, no further durable job begins; callers who wait
for an answer are served as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = 8
"""Runs whose ends may be on their way beside those that run: a slow broker holds the next runs back."""

QUICK_S = 1.0
"""How long the ends of a run of durable jobs count among those."""

SLOW_RUNS = 32
"""Runs of durable jobs whose ends may wait for longer."""


class CommitSlots:
    """The ends of one model version; ``changed`` is called when there may be room for another run."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._quick = 0
        self._slow = 0

    def full(self, copies: int) -> bool:
        """Whether a model with so many copies must begin no further run."""
        return self._quick >= copies + ENDING

    @property
    def durable_full(self) -> bool:
        """Whether no further run of durable jobs must begin."""
        return self._slow >= SLOW_RUNS

    def expect(self) -> None:
        """A run begins, whose ends will be sent."""
        self._quick += 1

    @contextmanager
    def sending(self, *, durable: bool) -> Iterator[None]:
        """The ends of an expected run are sent while the block runs."""
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
