"""Attempts that whoever makes them can repeat as fast as he likes, until they become audit entries: alike ones are one."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tether.audit import NOBODY, Kind

MOST_GROUPS = 256
"""Different attempts that are told apart until they are taken; the others share an entry."""

MOST_OF_ONE = 32
"""Of these, by one key, or together by all who showed none that is known: what they vary hides nothing that others do."""

OTHERS = "(others)"


class Attempt(NamedTuple):
    """What makes attempts alike."""

    kind: Kind
    tenant: str
    actor: str
    action: str
    outcome: str
    model: str = ""
    address: str = ""
    detail: str = ""


class RepeatedAttempt:
    """When an attempt came first and last (UTC milliseconds), how often, and the first one's request."""

    __slots__ = ("count", "first", "last", "request")

    def __init__(self, now: int, request: str) -> None:
        self.first = self.last = now
        self.count = 0
        self.request = request


class Attempts:
    """Those since they were last taken."""

    def __init__(self) -> None:
        self._seen: dict[Attempt, RepeatedAttempt] = {}
        self._by: Counter[tuple[Kind, str]] = Counter()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, attempt: Attempt, now: int, request: str, by: str) -> None:
        """Count one. ``by``: who it counts for, which is not the actor where the caller chose that name."""
        if attempt not in self._seen:
            if self._by[attempt.kind, by] >= MOST_OF_ONE:
                attempt = Attempt(attempt.kind, attempt.tenant, by, OTHERS, attempt.outcome)
            elif len(self._seen) >= MOST_GROUPS:
                attempt = Attempt(attempt.kind, "", NOBODY, OTHERS, attempt.outcome)
        seen = self._seen.get(attempt)
        if seen is None:
            seen = self._seen[attempt] = RepeatedAttempt(now, request)
            self._by[attempt.kind, by] += 1
        seen.last = now
        seen.count += 1

    def take(self) -> dict[Attempt, RepeatedAttempt]:
        """All of them; the next begin anew."""
        taken, self._seen = self._seen, {}
        self._by.clear()
        return taken
