"""Supervises one machine's processes: starts them in order, restarts them with backoff, stops them in reverse."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from tether.broker.embedded_server import EmbeddedServer
from tether.environment import without_passphrase
from tether.errors import ConfigError, TetherError, Unavailable
from tether.process.data_dir import Home
from tether.process.lifecycle import Tasks
from tether.process.os_process import die_with_parent

log = logging.getLogger(__name__)

BROKER, MODELSTORE, DISPATCHER, GATEWAY = "nats", "modelstore", "dispatcher", "gateway"
"""Names of the parts; every other name is a worker's."""

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
SETTLED_S = 10.0
"""Lifetime in seconds after which a process is not in a crash loop."""

START_ATTEMPTS = 3
"""Exits before its first readiness after which a service is given up."""


class Backoff:
    """Delay before the next start of a process that exited."""

    def __init__(self) -> None:
        self._next = FIRST_DELAY_S

    def after(self, lived_s: float) -> float:
        """Return the delay in seconds after a life of ``lived_s`` seconds: doubled, and reset by a long life."""
        if lived_s >= SETTLED_S:
            self._next = FIRST_DELAY_S
        delay, self._next = self._next, min(2 * self._next, LONGEST_DELAY_S)
        return delay


class Part(Protocol):
    """A restartable process."""

    @property
    def pid(self) -> int: ...

    async def start(self) -> None: ...

    async def wait(self) -> int: ...

    async def stop(self, *, grace_s: float) -> None: ...


class Service:
    """One Tether service as a child process.

    ``environment`` is added to this process's own; ``host`` is the address of its ``/readyz``.
    """

    def __init__(
        self, home: Home, name: str, command: str, environment: Mapping[str, str], *, host: str, to_file: bool
    ) -> None:
        self.name = name
        self.host = host
        self.environment = dict(environment)
        self._home = home
        self._command = command
        self._port_variable = "TETHER_HTTP_PORT" if name == GATEWAY else "TETHER_OPS_PORT"
        self._to_file = to_file
        self._log = home.logs / f"{name}.log"
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def port(self) -> int:
        """Port on which the running process reports to listen; 0 until it has reported."""
        try:
            content = json.loads((self._home.run / f"{self.name}.json").read_bytes())
        except (OSError, ValueError):
            return 0
        return int(content["port"]) if content.get("pid") == self.pid else 0

    @property
    def address(self) -> tuple[str, int]:
        """Address it listens on, also during a restart."""
        return self.host, int(self.environment[self._port_variable])

    def url(self, path: str) -> str:
        """Return a URL of the running process."""
        host, port = self.address
        return f"http://{_literal(host)}:{port}{path}"

    def keep_port(self) -> None:
        """Let the next process listen on the same port, which clients know."""
        self.environment[self._port_variable] = str(self.port())

    def last_words(self) -> str:
        """Return the last line of its log, or the place of the log."""
        if not self._to_file:
            return "see its output above"
        return last_line(self._log) or f"{self._log} is empty"

    async def start(self) -> None:
        with ExitStack() as stack:
            output = sys.stderr.fileno()
            if self._to_file:
                self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                output = stack.enter_context(self._log.open("ab")).fileno()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tether_cli",
                self._command,
                env={**without_passphrase(), **self.environment},
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )

    async def wait(self) -> int:
        return 0 if self._process is None else await self._process.wait()

    async def stop(self, *, grace_s: float) -> None:
        """Send SIGTERM, then SIGKILL after ``grace_s`` seconds."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not stop in time and was killed", self.name, extra={"action": "child_killed"})
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


@dataclass
class Supervised:
    """A supervised part. ``proven``: it was ready once, so an exit is an accident and not a wrong setting."""

    part: Part
    restarts: int = 0
    proven: bool = False
    why: str = ""
    """Reason of the last restart."""
    ending: str = ""
    """Reason of the termination in progress; empty if the process exits by itself."""


class Supervisor:
    """Owns the broker (None if an external one is used) and the services.

    ``stopping`` stops it from outside; ``on_change`` is called whenever a process started or became ready.
    """

    def __init__(
        self,
        broker: EmbeddedServer | None,
        *,
        stopping: asyncio.Event,
        grace_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.entries: dict[str, Supervised] = {} if broker is None else {BROKER: Supervised(broker)}
        self.services: list[Service] = []
        self.stopping = stopping
        self._grace_s = grace_s
        self._on_change = on_change
        self._tasks = Tasks()
        self._failed: TetherError | None = None

    async def start_broker(self) -> None:
        """Start the embedded broker, if there is one, and keep it running.

        Raises:
            ConfigError, BrokerUnavailable: it did not start.
        """
        entry = self.entries.get(BROKER)
        if entry is not None:
            await entry.part.start()
            entry.proven = True
            self._tasks.spawn(self._keep(BROKER, entry), f"keep-{BROKER}")

    async def start_services(self, services: list[Service], *, timeout_s: float) -> None:
        """Start the services in order and return once all are ready.

        Raises:
            ConfigError: a service exited repeatedly; its log says why.
            Unavailable: a service was not ready in ``timeout_s`` seconds, or a stop was requested.
        """
        self.services = services
        for service in services:
            entry = self.entries[service.name] = Supervised(service)
            await service.start()
            self._tasks.spawn(self._keep(service.name, entry), f"keep-{service.name}")
        self._on_change()
        try:
            async with asyncio.timeout(timeout_s), httpx.AsyncClient(trust_env=False, timeout=2) as http:
                for service in self.services:
                    await self._until_ready(http, service)
        except TimeoutError as error:
            late = ", ".join(service.name for service in self.services if not self.entries[service.name].proven)
            raise Unavailable(f"not ready after {timeout_s:g} s: {late}; see the log of each") from error

    async def _until_ready(self, http: httpx.AsyncClient, service: Service) -> None:
        while not await is_started(http, service):
            if self._failed is not None:
                raise self._failed
            if self.stopping.is_set():
                raise Unavailable("stopped before all services were ready")
            await asyncio.sleep(0.05)
        self.entries[service.name].proven = True
        service.keep_port()
        self._on_change()

    async def _keep(self, name: str, entry: Supervised) -> None:
        backoff = Backoff()
        while True:
            began = time.monotonic()
            status = await entry.part.wait()
            if self.stopping.is_set():
                return
            entry.restarts += 1
            entry.why, entry.ending = entry.ending or _ended(status), ""
            if not entry.proven and entry.restarts >= START_ATTEMPTS:
                words = entry.part.last_words() if isinstance(entry.part, Service) else "see its log"
                self._failed = ConfigError(f"{name} ended {entry.restarts} times with status {status}: {words}")
                return
            delay = backoff.after(time.monotonic() - began)
            log.warning("%s: %s; restart in %.1f s", name, entry.why, delay, extra={"action": "child_died"})
            await self._again(name, entry, delay)

    async def _again(self, name: str, entry: Supervised, delay_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), delay_s)
        if self.stopping.is_set():
            return
        try:
            await entry.part.start()
        except (TetherError, OSError) as error:
            log.warning("%s did not start: %s", name, error, extra={"action": "child_start_failed"})
        if self.stopping.is_set():
            await entry.part.stop(grace_s=self._grace_s)
        self._on_change()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task beside the processes; it must end soon after ``stopping`` is set."""
        self._tasks.spawn(work, name)

    async def stop(self) -> None:
        """Stop the gateway first and the broker last; return once every process has ended."""
        self.stopping.set()
        stores = [name for name in self.entries if name.startswith(MODELSTORE)]
        workers = [name for name in self.entries if name not in (GATEWAY, DISPATCHER, *stores, BROKER)]
        for group in ([GATEWAY], workers, [DISPATCHER], stores, [BROKER]):
            parts = [self.entries[name].part for name in group if name in self.entries]
            await asyncio.gather(*(part.stop(grace_s=self._grace_s) for part in parts))
        await self._tasks.finish(self._grace_s)
        await self._tasks.cancel()


def last_line(path: Path, start: int = 0) -> str:
    """Return the last line of a text file after byte ``start``; empty if there is none."""
    try:
        lines = path.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    # drop the error codes at the line's end: the error that repeats it adds its own
    return re.sub(r"( \([a-z_]+\))+$", "", lines[-1].removeprefix("error: ")) if lines else ""


async def unready(http: httpx.AsyncClient, host: str, port: int) -> dict[str, str]:
    """Return why a service is not ready, by dependency, from its own report; empty if it is ready."""
    if not port:
        return {"process": "has not reported its address yet"}
    try:
        answer = await http.get(f"http://{_literal(host)}:{port}/readyz")
        if answer.status_code == 200:
            return {}
        checks: dict[str, str] = answer.json()["checks"]
        return {name: state for name, state in checks.items() if state != "ok"}
    except httpx.HTTPError as error:
        return {"process": f"does not answer ({type(error).__name__})"}
    except (ValueError, KeyError, AttributeError):
        return {"process": f"answered {answer.status_code} with an unexpected body"}


async def is_started(http: httpx.AsyncClient, service: Service) -> bool:
    """Return whether a service is ready, or lacks only broker disk space: a platform must start on a full disk, else
    nobody could delete from it.
    """
    missing = await unready(http, service.host, service.port())
    if missing and "storage" in missing and not set(missing) - {"storage", "jobs", "results"}:
        log.warning("%s is not ready: %s", service.name, missing["storage"], extra={"action": "storage_full"})
        return True
    return not missing


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _ended(status: int) -> str:
    return (
        f"exited with status {status}" if status >= 0 else f"killed by signal {-status} ({signal.strsignal(-status)})"
    )
