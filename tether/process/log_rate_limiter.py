"""Says so many things of a kind in a time and counts the rest: for what others can cause, and for what is tried again and again."""

from __future__ import annotations

from collections.abc import Callable

LINES = 10
"""Of one kind, in a second."""


class LogRateLimiter:
    """``now`` is monotonic seconds; kinds are few."""

    def __init__(self, now: Callable[[], float], *, lines: int = LINES, within_s: float = 1.0) -> None:
        self._now = now
        self._lines = lines
        self._within_s = within_s
        self._kinds: dict[str, tuple[float, int, int]] = {}
        """By kind: when its time began, how many were said in it, how many were held back since one was said."""

    def passes(self, kind: str) -> int | None:
        """How many of this kind were held back since the last one that passed; None: hold this one back too."""
        now = self._now()
        began, said, held = self._kinds.get(kind, (now, 0, 0))
        if now - began >= self._within_s:
            began, said = now, 0
        if said >= self._lines:
            self._kinds[kind] = (began, said, held + 1)
            return None
        self._kinds[kind] = (began, said + 1, 0)
        return held
