"""Restarts processes that answer no health check, and a broker that has stopped storing.

A live process can be stopped, wait for a lock or have a stuck event loop. After a write error nats-server
stores nothing more in the affected stream until it is restarted.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tether.broker.embedded_server import EmbeddedServer, is_healthy
from tether.process import disk
from tether.process.os_process import send
from tether.settings import Settings
from tether.streams.broker_storage import frozen_streams
from tether_cli.platform.supervisor import BROKER, Service, Supervised, Supervisor

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Seconds between two health checks of a process."""

ANSWER_S = 5.0
"""Timeout of a health check, in seconds."""

STARTING = 4
"""Factor on the allowed silence of a process that is starting or busy."""

AT_WORK = 0.3
"""Share of a processor above which a silent process counts as busy, not stuck."""

BROKEN_S = 4.0
"""Seconds that a broker must have stopped storing, with free space, before it is restarted."""

PAUSES_S = (0.0, 30.0, 60.0, 300.0)
"""Minimum seconds between restarts of a broker that repeatedly stops storing despite free space."""


@dataclass
class Silence:
    """Silence of one run of a process. ``seconds`` counts only time spent waiting for an answer, so a suspended
    machine or a starved supervisor adds nothing.
    """

    pid: int
    seconds: float = 0.0
    answered: bool = False
    busy_s: float = 0.0
    """Processor time used when the silence began."""

    def heard(self, pid: int) -> None:
        self.pid, self.seconds, self.answered = pid, 0.0, True

    def missed(self, pid: int, waited_s: float, used_s: float) -> None:
        if pid != self.pid:
            self.pid, self.seconds, self.answered = pid, 0.0, False
        if not self.seconds:
            self.busy_s = used_s
        self.seconds += waited_s

    def over(self, limit_s: float, used_s: float) -> bool:
        """Return whether the silence is too long, with ``used_s`` seconds of processor time used by now."""
        at_work = used_s - self.busy_s > AT_WORK * self.seconds
        return self.seconds >= limit_s * (STARTING if at_work or not self.answered else 1)


def processor_s(pid: int) -> float:
    """Return a process's processor time in seconds; 0 if it has ended."""
    import psutil

    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(used.user + used.system)


class Watch:
    """Health checks of one supervisor's processes. ``on_change`` is called when the published state changes."""

    def __init__(
        self, supervisor: Supervisor, settings: Settings, broker: EmbeddedServer | None, on_change: Callable[[], None]
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._broker = broker
        self._on_change = on_change
        self._silent: dict[str, Silence] = {}
        self._broken_since = 0.0
        self._restarts = 0
        self._restarted_at = float("-inf")
        self.storage = ""
        """Why the embedded broker stores nothing more, or soon will not; empty while it stores."""

    async def run(self) -> None:
        """Check until the supervisor stops."""
        async with httpx.AsyncClient(trust_env=False) as http:
            while not await self._stopped(LOOK_S):
                looks = [self._look(http, name, entry) for name, entry in self._supervisor.entries.items()]
                for failed in await asyncio.gather(*looks, self._look_at_storage(http), return_exceptions=True):
                    if isinstance(failed, Exception):
                        log.error("a health check failed", exc_info=failed, extra={"action": "watch_failed"})
                self._on_change()

    async def _stopped(self, within_s: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._supervisor.stopping.wait(), within_s)
        return self._supervisor.stopping.is_set()

    # processes

    async def _look(self, http: httpx.AsyncClient, name: str, entry: Supervised) -> None:
        limit_s, pid = self._settings.unresponsive_s, entry.part.pid
        if not limit_s or not entry.proven or not pid or self._supervisor.stopping.is_set():
            return
        began = time.monotonic()
        answered = await self._answers(http, name, entry, min(ANSWER_S, limit_s))
        if pid != entry.part.pid:
            return
        silence = self._silent.setdefault(name, Silence(pid))
        if answered:
            silence.heard(pid)
            return
        used_s = processor_s(pid)
        silence.missed(pid, min(time.monotonic() - began, 2 * ANSWER_S) + LOOK_S, used_s)
        if silence.over(limit_s, used_s):
            entry.ending = f"it answered no health check for {silence.seconds:.0f} s"
            log.error("%s: %s ; process killed", name, entry.ending, extra={"action": "child_unresponsive"})
            send(pid, signal.SIGKILL)

    async def _answers(self, http: httpx.AsyncClient, name: str, entry: Supervised, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                if name == BROKER and self._broker is not None:
                    return await is_healthy(http, self._broker.monitor)
                if isinstance(entry.part, Service):
                    return (await http.get(entry.part.url("/healthz"), timeout=within_s)).status_code == 200
        except (TimeoutError, httpx.HTTPError):
            return False
        return True

    # the broker's storage

    async def _look_at_storage(self, http: httpx.AsyncClient) -> None:
        entry = self._supervisor.entries.get(BROKER)
        if entry is None or self._broker is None or not self._broker.running or self._supervisor.stopping.is_set():
            return
        frozen = await frozen_streams(http, self._broker.monitor)
        missing = await asyncio.to_thread(self._missing_room, self._broker.home.nats_store, try_it=bool(frozen))
        self.storage = "; ".join(filter(None, (f"the broker's disk {missing}" if missing else "", frozen)))
        if missing:
            self._restarts = 0  # a later failure is a new one
        if not frozen or missing:
            self._broken_since = 0.0
            return
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        pause = PAUSES_S[min(self._restarts, len(PAUSES_S) - 1)]
        if now - self._broken_since >= BROKEN_S and now - self._restarted_at >= pause:
            await self._restart(entry, frozen, now)

    def _missing_room(self, folder: Path, *, try_it: bool) -> str:
        room = disk.look(folder)
        short = "" if room is None else disk.shortage(room, self._settings.store_reserve_mb)
        if short:
            return short
        refused = disk.refusal(folder) if try_it else ""
        return f"takes no files ({refused})" if refused else ""

    async def _restart(self, entry: Supervised, frozen: str, now: float) -> None:
        if now - self._restarted_at > PAUSES_S[-1]:
            self._restarts = 0
        self._restarts += 1
        self._restarted_at, self._broken_since = now, 0.0
        entry.ending = f"{frozen}, and there is room again"
        log.warning("%s; broker restarted", entry.ending, extra={"action": "broker_restarted"})
        await entry.part.stop(grace_s=self._settings.shutdown_timeout_s)
