"""Detects that the broker cannot store: its disk is full, or it has stopped writing to streams.

nats-server stops writing to a stream permanently after its first write error, and answers no publish to it;
other streams go on. Its monitor reports that in ``/healthz``. Only a restart with free disk space makes it
write again.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import httpx

from tether.errors import BrokerUnavailable, StorageFull, TetherError
from tether.process import disk, metrics
from tether.process.clock import SystemClock
from tether.settings import Settings

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Seconds between two checks of the disk."""

MONITOR_S = 2.0
"""Seconds between two requests to the broker's monitor."""

_FRESH_S = 0.02
"""Maximum age in seconds of a disk check when something large is stored; a check takes some microseconds."""

_ENOUGH = 1.25
"""Multiple of the reserve that must be free before work is accepted again."""

_STREAM = re.compile(r"'[^']* > ([^']+)'")
_CAUSES = (
    "no space left on device",
    "read-only file system",
    "disk quota exceeded",
    "permission denied",
    "input/output error",
    "file too large",
)


async def frozen_streams(http: httpx.AsyncClient, monitor: str) -> str:
    """Return the streams that the broker stopped writing to and why; empty if none, or no answer.

    The text has no paths, so any caller may see it.
    """
    try:
        answer = (await http.get(f"{monitor}/healthz", params={"details": "true"}, timeout=2)).json()
    except (httpx.HTTPError, ValueError):
        return ""
    errors = [str(item.get("error", "")) for item in answer.get("errors") or [] if isinstance(item, dict)]
    broken = [text for text in errors if "write error" in text]
    if not broken:
        return ""
    names = sorted({found[1] for text in broken if (found := _STREAM.search(text))})
    cause = next((cause for cause in _CAUSES if any(cause in text for text in broken)), "write error")
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"the broker has stopped storing in {listed or 'a stream'} ({cause})"


class BrokerStorage:
    """State of the broker's storage, from ``nats_store_dir`` and ``nats_monitor_url``.

    Without either, nothing is known and nothing refused. ``full`` is the reason why work is refused, for
    callers to read; empty while there is space.
    """

    def __init__(self, settings: Settings, clock: SystemClock) -> None:
        self._folder = Path(settings.nats_store_dir) if settings.nats_store_dir else None
        self._monitor = settings.nats_monitor_url.rstrip("/")
        self._reserve_mb = settings.store_reserve_mb
        self._clock = clock
        self._asked = self._looked = float("-inf")
        self._short = ""
        self._frozen = ""
        self.full = ""

    async def keep(self) -> None:
        """Check until cancelled."""
        async with httpx.AsyncClient(trust_env=False) as http:
            while True:
                await self.check(http)
                await asyncio.sleep(CHECK_S)

    async def check(self, http: httpx.AsyncClient) -> None:
        """Update ``full``."""
        self._check_disk()
        now = self._looked
        if self._monitor and now - self._asked >= MONITOR_S:
            self._asked = now
            self._frozen = await frozen_streams(http, self._monitor)
        self._log_change()

    def _check_disk(self) -> None:
        self._looked = self._clock.monotonic()
        room = None if self._folder is None else disk.look(self._folder)
        if room is None:
            return
        metrics.BROKER_DISK_FREE.set(room.free)
        missing = disk.shortage(room, self._reserve_mb, more=_ENOUGH if self._short else 1.0)
        self._short = f"the broker's disk {missing}" if missing else ""

    def _log_change(self) -> None:
        reason = self._short or self._frozen
        if bool(reason) != bool(self.full):
            if reason:
                log.error("refusing to store more: %s", reason, extra={"action": "storage_full"})
            else:
                log.info("the broker can store again", extra={"action": "storage_free"})
        self.full = reason

    def require(self) -> None:
        """Check for space again if the last check is too old; a disk can fill in less than a second.

        Raises:
            StorageFull: there is no space.
        """
        if self._clock.monotonic() - self._looked > _FRESH_S:
            self._check_disk()
            self._log_change()
        if self.full:
            raise self._error()

    def explained(self, error: TetherError) -> TetherError:
        """Return StorageFull instead if full storage explains ``error``: a full broker does not answer."""
        if self.full and isinstance(error, BrokerUnavailable):
            return self._error()
        return error

    def _error(self) -> StorageFull:
        fix = "delete models, move other files away, or enlarge the disk"
        if self._frozen and not self._short:
            fix = "make room on its disk or make it writable, then restart the broker (an embedded one restarts itself)"
        return StorageFull(f"{self.full}; nothing was stored: {fix}")
