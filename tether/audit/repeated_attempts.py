"""Groups attempts that a client can repeat at will: identical ones become one audit entry."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tether.audit import NOBODY, Kind

MOST_GROUPS = 256
"""Maximum distinct groups between two flushes; further ones share an entry."""

MOST_OF_ONE = 32
"""Maximum groups by one key, or by all requests without a known key: variations of one do not hide others."""

OTHERS = "(others)"


class Attempt(NamedTuple):
    """Fields in which identical attempts are equal."""

    kind: Kind
    tenant: str
    actor: str
    action: str
    outcome: str
    model: str = ""
    address: str = ""
    detail: str = ""


class RepeatedAttempt:
    """Times of the first and last attempt (UTC milliseconds), their number, and the first one's request."""

    __slots__ = ("count", "first", "last", "request")

    def __init__(self, now: int, request: str) -> None:
        self.first = self.last = now
        self.count = 0
        self.request = request


class Attempts:
    """Attempts since the last flush."""

    def __init__(self) -> None:
        self._seen: dict[Attempt, RepeatedAttempt] = {}
        self._by: Counter[tuple[Kind, str]] = Counter()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, attempt: Attempt, now: int, request: str, by: str) -> None:
        """Count an attempt. ``by``: its owner for the limit, if the caller chose the actor's name."""
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
        """Return all groups and start over."""
        taken, self._seen = self._seen, {}
        self._by.clear()
        return taken
