"""The system's clocks, and the one place that reads them."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Time, passed in. ``monotonic`` is for durations inside a process, ``utc`` for what crosses processes (seconds)."""

    def monotonic(self) -> float: ...

    def utc(self) -> float: ...


class SystemClock:
    """Real time. ``monotonic`` and ``utc`` in seconds, ``utc_ms`` in whole milliseconds."""

    def monotonic(self) -> float:
        return time.monotonic()

    def utc(self) -> float:
        return time.time()

    def utc_ms(self) -> int:
        return time.time_ns() // 1_000_000


class AnchoredClock(SystemClock):
    """This machine's clock until :meth:`anchor` says what time another machine has; from then on that machine's, carried on by
    the monotonic clock, so that no correction of this machine's own clock moves it."""

    def __init__(self, own: SystemClock) -> None:
        self._own = own
        self._ahead: float | None = None
        """UTC less monotonic seconds, on the other machine's clock."""

    def anchor(self, utc: float) -> None:
        """The other machine has ``utc`` (seconds) just now."""
        self._ahead = utc - self.monotonic()

    def monotonic(self) -> float:
        return self._own.monotonic()

    def utc(self) -> float:
        return self._own.utc() if self._ahead is None else self.monotonic() + self._ahead

    def utc_ms(self) -> int:
        return self._own.utc_ms() if self._ahead is None else int(self.utc() * 1000)
