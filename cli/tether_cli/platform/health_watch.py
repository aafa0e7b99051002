"""Looks after what the supervisor runs: restarts what answers no health check, and a broker that has stopped storing.

A process can live and do nothing: it was stopped, it waits for a lock, its event loop is stuck. And nats-server, after a
write error, stores nothing more in the stream that it befell, until it is started again.
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
"""Between two health checks of a process."""

ANSWER_S = 5.0
"""How long a health check may take."""

STARTING = 4
"""A process that has not answered yet, or that is at work, may be silent this many times as long."""

AT_WORK = 0.3
"""A silent process that uses more than this part of a processor is at work and not stuck."""

BROKEN_S = 4.0
"""How long a broker must have stopped storing, and had room, before it is restarted."""

PAUSES_S = (0.0, 30.0, 60.0, 300.0)
"""Least time between two restarts of a broker that stops storing again and again although it has room."""


@dataclass
class Silence:
    """How long one run of a process has answered nothing. ``seconds`` counts time that was waited for an answer, so neither
    a machine that slept nor a supervisor that was starved adds to it."""

    pid: int
    seconds: float = 0.0
    answered: bool = False
    busy_s: float = 0.0
    """Processor time that the process had used when it fell silent."""

    def heard(self, pid: int) -> None:
        self.pid, self.seconds, self.answered = pid, 0.0, True

    def missed(self, pid: int, waited_s: float, used_s: float) -> None:
        if pid != self.pid:
            self.pid, self.seconds, self.answered = pid, 0.0, False
        if not self.seconds:
            self.busy_s = used_s
        self.seconds += waited_s

    def over(self, limit_s: float, used_s: float) -> bool:
        """Whether it has lasted too long, the process having used ``used_s`` seconds of processor time by now."""
        at_work = used_s - self.busy_s > AT_WORK * self.seconds
        return self.seconds >= limit_s * (STARTING if at_work or not self.answered else 1)


def processor_s(pid: int) -> float:
    """Processor time that a process has used, in seconds; 0 when it is gone."""
    import psutil

    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(used.user + used.system)


class Watch:
    """Health checks of one supervisor's processes. ``on_change`` is called when there is something to publish."""

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
        """Why the embedded broker stores nothing more, or soon will not; empty when it does."""

    async def run(self) -> None:
        """Look until the supervisor stops."""
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
            log.error("%s: %s and is killed", name, entry.ending, extra={"action": "child_unresponsive"})
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
            self._restarts = 0  # what comes after it is another failure than the last one
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
        log.warning("%s: it is restarted", entry.ending, extra={"action": "broker_restarted"})
        await entry.part.stop(grace_s=self._settings.shutdown_timeout_s)
