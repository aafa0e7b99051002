"""The system's clocks, and the one place that reads them."""

from __future__ import annotations

import time


class SystemClock:
    """Real time. ``monotonic`` and ``utc`` in seconds, ``utc_ms`` in whole milliseconds."""

    def monotonic(self) -> float:
        return time.monotonic()

    def utc(self) -> float:
        return time.time()

    def utc_ms(self) -> int:
        return time.time_ns() // 1_000_000
