"""Extends the ack wait of unsettled messages from a thread that inference cannot block.

The thread has its own event loop and connection. It sends ``+WPI`` every third of a lane's ack wait, so that
the broker does not redeliver a message that this worker still processes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass

from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.errors import TetherError
from tether.process.data_dir import Home
from tether.settings import Settings

log = logging.getLogger(__name__)

_TICK_S = 0.1


@dataclass(slots=True)
class _Entry:
    due: float
    interval: float


class KeepAlive:
    """Keeps messages from being redelivered; its thread reads what the worker's loop adds and drops."""

    def __init__(self, settings: Settings, home: Home, identity: str) -> None:
        self._settings = settings
        self._home = home
        self._identity = identity
        self._entries: dict[str, _Entry] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keepalive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Stop the thread and wait up to 10 s for it; it may be waiting for the broker."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 10)

    def hold(self, ack_subject: str, ack_wait_s: float, now: float) -> None:
        """Keep a message from being redelivered until ``drop``. ``now`` is monotonic seconds."""
        interval = ack_wait_s / 3
        self._entries[ack_subject] = _Entry(now + interval, interval)

    def drop(self, ack_subject: str) -> None:
        self._entries.pop(ack_subject, None)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(self._serve())
            except TetherError as error:
                log.warning("keep-alive: %s", error, extra={"action": "keepalive_lost"})
            except Exception:
                log.exception("keep-alive failed", extra={"action": "keepalive_lost"})
            self._stop.wait(1)

    async def _serve(self) -> None:
        async with connect(self._settings, self._home, self._identity, follow=False) as bus:
            while not (self._stop.is_set() or bus.closed.is_set()):
                await self._send_due(bus)
                await asyncio.sleep(_TICK_S)

    async def _send_due(self, bus: Bus) -> None:
        now = bus.clock.monotonic()
        for subject, entry in list(self._entries.items()):
            if entry.due <= now and bus.connected:
                entry.due = now + entry.interval
                await bus.publish(subject, b"+WPI")
