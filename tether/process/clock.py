"""Clocks; the only place that reads the system's clocks."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time in seconds: ``monotonic`` inside a process, ``utc`` across processes."""

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
    """This machine's clock until :meth:`anchor` sets another machine's time.

    From then on it advances with the monotonic clock, so corrections of this machine's clock do not affect
    it.
    """

    def __init__(self, own: SystemClock) -> None:
        self._own = own
        self._ahead: float | None = None
        """UTC minus monotonic seconds, by the other machine's clock."""

    def anchor(self, utc: float) -> None:
        """Set the time: the other machine's clock shows ``utc`` (seconds) now."""
        self._ahead = utc - self.monotonic()

    def monotonic(self) -> float:
        return self._own.monotonic()

    def utc(self) -> float:
        return self._own.utc() if self._ahead is None else self.monotonic() + self._ahead

    def utc_ms(self) -> int:
        return self._own.utc_ms() if self._ahead is None else int(self.utc() * 1000)
