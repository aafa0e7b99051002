"""Rate-limits log lines per kind and counts the rest: for events that peers can cause, and for retries."""

from __future__ import annotations

from collections.abc import Callable

LINES = 10
"""Lines of one kind in a second."""


class LogRateLimiter:
    """Limits lines per kind; use few kinds. ``now`` returns monotonic seconds."""

    def __init__(self, now: Callable[[], float], *, lines: int = LINES, within_s: float = 1.0) -> None:
        self._now = now
        self._lines = lines
        self._within_s = within_s
        self._kinds: dict[str, tuple[float, int, int]] = {}
        """By kind: start of its interval, lines passed in it, lines suppressed since the last one passed."""

    def passes(self, kind: str) -> int | None:
        """Return the lines of this kind suppressed since the last one passed; None: suppress this one too."""
        now = self._now()
        began, said, held = self._kinds.get(kind, (now, 0, 0))
        if now - began >= self._within_s:
            began, said = now, 0
        if said >= self._lines:
            self._kinds[kind] = (began, said, held + 1)
            return None
        self._kinds[kind] = (began, said + 1, 0)
        return held
