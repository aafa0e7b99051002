"""Runs one machine's whole platform as one process tree: ``tether up`` and ``tether down``."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tether.broker.embedded_server import EmbeddedServer, check_server
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.api_key import SCOPES, key_id, new_key_text, stored_key
from tether.errors import ConfigError, Conflict, Unavailable
from tether.identity.keys import create_home, store_names
from tether.model.ownership import DEFAULT_TENANT
from tether.process.data_dir import Home, private_folder, read_secret, write_secret
from tether.process.lifecycle import stop_on_signals
from tether.process.os_process import alive, can_listen, keep_memory_private, send, why_not_listen
from tether.settings import Settings, load
from tether.wire import codec
from tether_cli.platform.broker_streams import bring_up_to_date
from tether_cli.platform.greeting import greet
from tether_cli.platform.health_watch import Watch
from tether_cli.platform.supervisor import DISPATCHER, GATEWAY, MODELSTORE, Service, Supervisor, last_line

log = logging.getLogger(__name__)

START_S = 60.0
"""Maximum seconds from ``tether up`` to its ready line."""


@dataclass(frozen=True)
class UpOptions:
    """Options of ``tether up``. ``http``: address and port, None for the gateway's own settings."""

    settings: Settings
    http: tuple[str, int] | None = None
    to_files: bool = False

    @property
    def home(self) -> Home:
        return Home.at(self.settings.home)


def parse_address(text: str) -> tuple[str, int]:
    """Parse ``HOST:PORT``, ``[V6]:PORT`` or ``:PORT``.

    Raises:
        ConfigError: the text has another form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"'{text[:64]}' is not HOST:PORT, e.g. 127.0.0.1:8000", field="http")
    return host.strip("[]") or "127.0.0.1", int(port)


def local(host: str) -> str:
    """Return the local address to reach a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def ops_ports(settings: Settings) -> dict[str, int]:
    """Return the usual operations port of every service except the gateway, in starting order."""
    return {
        **{name: 8004 + 2 * number for number, name in enumerate(store_names(settings.model_stores))},
        DISPATCHER: 8002,
        **{f"worker-{number}": 7999 + 2 * number for number in range(1, settings.workers + 1)},
    }


def services(plan: UpOptions, nats_url: str, monitor: str) -> list[Service]:
    """Return the services in starting order: model stores, dispatcher, workers, gateway. ``monitor`` is the
    broker's.
    """
    common = {
        "TETHER_HOME": str(plan.home.root),
        "TETHER_NATS_URL": nats_url,
        "TETHER_PARTITIONS": str(plan.settings.partitions),
        "TETHER_STORE_RESERVE_MB": str(plan.settings.store_reserve_mb),
        "TETHER_NATS_MONITOR_URL": monitor,
        "TETHER_NATS_STORE_DIR": plan.settings.nats_store_dir if plan.settings.nats_url else str(plan.home.nats_store),
    }
    any_port = plan.settings.ops_port == 0 or (plan.http is not None and plan.http[1] == 0)
    host = local(plan.settings.ops_host)
    made = []
    for name, usual in ops_ports(plan.settings).items():
        port = 0 if any_port or not can_listen(plan.settings.ops_host, usual) else usual
        own = {**common, "TETHER_OPS_PORT": str(port), "TETHER_OPS_HOST": plan.settings.ops_host}
        command = name
        if name.startswith("worker-"):
            command, own["TETHER_WORKER_NAME"] = "worker", name
        elif name != DISPATCHER:
            command, own["TETHER_MODELSTORE_NAME"] = MODELSTORE, name
        made.append(Service(plan.home, name, command, own, host=host, to_file=plan.to_files))
    address = plan.http or _gateway_address()
    common |= {"TETHER_HTTP_HOST": address[0], "TETHER_HTTP_PORT": str(address[1])}
    made.append(Service(plan.home, GATEWAY, GATEWAY, common, host=local(address[0]), to_file=plan.to_files))
    return made


def _gateway_address() -> tuple[str, int]:
    settings = load(GATEWAY)
    return settings.http_host, settings.http_port


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Lock the home for one supervisor.

    Raises:
        Conflict: another supervisor has locked it.
    """
    private_folder(home.run)
    with (home.run / "up.lock").open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                f"Tether already runs on {home.root}; stop it with 'tether down' or choose another --data-dir"
            ) from error
        yield


def is_locked(home: Home) -> bool:
    """Return whether a supervisor runs on the home."""
    if not home.run.is_dir():
        return False
    try:
        with locked(home):
            return False
    except Conflict:
        return True


def read_endpoints(home: Home) -> dict[str, Any] | None:
    """Return the endpoints file that the supervisor wrote; None if there is none."""
    try:
        content = json.loads(home.endpoints.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


async def run(plan: UpOptions) -> None:
    """Start everything, print the ready line, run until SIGTERM or SIGINT, stop everything.

    Raises:
        Conflict: a supervisor already runs on this home.
        ConfigError, Unavailable: a part did not start; all others were stopped again.
    """
    home = plan.home
    keep_memory_private()
    with locked(home):
        host, port = plan.http or _gateway_address()
        if reason := why_not_listen(host, port):
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}; choose another with --http HOST:PORT (port 0: a free one)",
                field="http",
            )
        create_home(home, workers=plan.settings.workers, model_stores=plan.settings.model_stores)
        _forget(home)
        try:
            await _supervise(plan)
        finally:
            _forget(home)


def _forget(home: Home) -> None:
    """Remove endpoints and pid files."""
    for pattern in ("*.pid", "*.json"):
        for path in home.run.glob(pattern):
            path.unlink(missing_ok=True)


class Platform:
    """The supervisor of a platform, and the endpoints file for other commands."""

    def __init__(self, plan: UpOptions, stopping: asyncio.Event) -> None:
        self.plan = plan
        self.broker = None if plan.settings.nats_url else EmbeddedServer(plan.home, plan.settings)
        grace_s = plan.settings.shutdown_timeout_s + 2.0
        self.supervisor = Supervisor(self.broker, stopping=stopping, grace_s=grace_s, on_change=self.publish)
        self.watch = Watch(self.supervisor, plan.settings, self.broker, self.publish)
        self.version = ""
        self.ready = False
        self._published: dict[str, Any] = {}

    @property
    def nats_url(self) -> str:
        return self.plan.settings.nats_url if self.broker is None else self.broker.url

    @property
    def monitor(self) -> str:
        return self.plan.settings.nats_monitor_url if self.broker is None else self.broker.monitor

    @property
    def http(self) -> str:
        """URL of the gateway; empty until it runs."""
        for service in self.supervisor.services:
            if service.name == GATEWAY:
                return service.url("")
        return ""

    async def start(self) -> None:
        self.publish()
        await self.supervisor.start_broker()
        if self.broker is not None:
            report = await check_server(self.broker.monitor)
            if report.problems:
                raise ConfigError(f"the broker is not suitable: {'; '.join(report.problems)}")
            self.version = report.version
        await bring_up_to_date(self.plan.settings, self.nats_url)
        await self.supervisor.start_services(services(self.plan, self.nats_url, self.monitor), timeout_s=START_S)
        await provide_admin_key(dataclasses.replace(self.plan.settings, nats_url=self.nats_url), self.plan.home)
        self.ready = True
        self.publish()
        self.supervisor.spawn(self.watch.run(), "watch")

    def publish(self) -> None:
        """Write the endpoints file if its content changed. A write that fails on a full disk is retried at
        the next check.
        """
        entries, own = self.supervisor.entries, self.supervisor.services
        pids = {name: entry.part.pid for name, entry in entries.items() if entry.part.pid}
        content = {
            "ready": self.ready,
            "supervisor": os.getpid(),
            "http": self.http,
            "nats": self.nats_url,
            "monitor": self.monitor,
            "storage": self.watch.storage,
            "version": self.version,
            "durability": "external" if self.broker is None else self.plan.settings.durability,
            "pids": pids,
            "restarts": {name: entry.restarts for name, entry in entries.items()},
            "reasons": {name: entry.why for name, entry in entries.items() if entry.why},
            "hosts": {service.name: service.address[0] for service in own},
            "ports": {service.name: service.address[1] for service in own},
        }
        if content == self._published:
            return
        try:
            write_secret(self.plan.home.endpoints, json.dumps(content, indent=1).encode())
            for name, pid in {"up": os.getpid(), **pids}.items():
                write_secret(self.plan.home.run / f"{name}.pid", f"{pid}\n".encode())
        except OSError as error:
            if not self.ready:
                raise ConfigError(f"{self.plan.home.run} cannot be written: {error.strerror}; make room") from error
            log.warning("endpoints file not written: %s", error, extra={"action": "endpoints_unwritten"})
        else:
            self._published = content


async def _supervise(plan: UpOptions) -> None:
    stop = stop_on_signals()
    platform = Platform(plan, stop)
    try:
        await platform.start()
        greet(plan.home, platform.http)
        await stop.wait()
    except Unavailable:
        if not stop.is_set():  # a stop during the start is no failure
            raise
    finally:
        await platform.supervisor.stop()


async def provide_admin_key(settings: Settings, home: Home, *, timeout_s: float = START_S) -> None:
    """Create ``admin.key`` unless it exists, and ensure that the platform accepts it."""
    if not home.admin_key.exists():
        write_secret(home.admin_key, f"{new_key_text()}\n".encode())
    text = read_secret(home.admin_key).decode().strip()
    identity = key_id(text)
    if identity is None:
        raise ConfigError(f"{home.admin_key} is not an API key; remove it and start again")
    end = time.monotonic() + timeout_s
    async with connect(settings, home, "admin") as bus:
        while True:
            try:
                await _store_key(bus, identity, text)
                return
            except Unavailable:  # the dispatcher has not made the bucket yet
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)


async def _store_key(bus: Bus, identity: str, text: str) -> None:
    bucket = SignedBucket(bus, "apikeys", MessageType.API_KEY)
    if await bucket.get(identity) is None:
        key = stored_key(text, tenant=DEFAULT_TENANT, scopes=SCOPES, name="tether up", created_at=bus.clock.utc())
        await bucket.put(identity, codec.encode(key))


def detach(arguments: list[str], home: Home) -> str:
    """Start ``tether up`` in the background and wait for its ready line; return the gateway's URL.

    Raises:
        Conflict: a supervisor already runs on this home.
        Unavailable: it did not become ready; the message has the last line of its log.
    """
    with locked(home):
        pass
    private_folder(home.logs)
    path = home.logs / "up.log"
    with path.open("ab") as output:
        before = output.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "tether_cli", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    end = time.monotonic() + START_S + 20
    while child.poll() is None and time.monotonic() < end:
        found = read_endpoints(home)
        if found is not None and found["ready"] and found["supervisor"] == child.pid:
            return str(found["http"])
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    if child.poll() is None:
        child.terminate()
        child.wait()
    raise Unavailable(f"the platform did not start: {last_line(path, before) or f'see {path}'}")


async def down(home: Home, *, timeout_s: float = 90.0) -> bool:
    """Stop the platform of a home and wait until it has ended; return False if none ran.

    Raises:
        Unavailable: it still runs after ``timeout_s`` seconds and after SIGKILL.
    """
    found = read_endpoints(home)
    if not is_locked(home):
        return _sweep(home, found) > 0
    if found is None:  # just started, or just stopping
        raise Unavailable(f"the platform on {home.root} is starting or stopping; try again in a moment")
    supervisor = int(found["supervisor"])
    send(supervisor, signal.SIGTERM)
    if not await _gone(home, supervisor, timeout_s):
        send(supervisor, signal.SIGKILL)
        if not await _gone(home, supervisor, 5):
            raise Unavailable(f"process {found['supervisor']} does not end, even after SIGKILL")
        _sweep(home, found)
    return True


async def _gone(home: Home, supervisor: int, timeout_s: float) -> bool:
    """Wait until lock and process are gone: the lock is released a moment before the process ends."""
    end = time.monotonic() + timeout_s
    while is_locked(home) or alive(supervisor):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.05)
    return True


def _sweep(home: Home, found: Mapping[str, Any] | None) -> int:
    """Kill the processes that a killed supervisor left behind; return their number."""
    left = [pid for pid in (found or {}).get("pids", {}).values() if alive(pid) and _ours(pid)]
    for pid in left:
        send(pid, signal.SIGKILL)
    _forget(home)
    return len(left)


def _ours(pid: int) -> bool:
    """Return whether the pid is still one of our processes and was not reused."""
    import psutil

    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return "tether_cli" in words or any("nats-server" in word for word in words[:1])
