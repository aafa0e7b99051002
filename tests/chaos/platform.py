"""``tether up`` as processes of their own on a fresh home, for scripts that end, pause and starve them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import httpx
import psutil
from chaos.report import fail
from support.platform.platforms import command, environment

from tether.process.data_dir import Home

Usage = dict[str, tuple[float, int]]
"""By process: memory in MB and open files."""


class Platform:
    """Broker, dispatcher, model store, workers and gateway on ``home``. ``settings`` are settings by name.

    Only processes whose environment or command line names ``home`` are ever signalled.
    """

    def __init__(self, home: Path, port: int, *, workers: int = 2, keep: bool = False, **settings: float | str) -> None:
        self.home = home
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.workers = workers
        self.url = f"http://127.0.0.1:{port}"
        given = {f"TETHER_{name.upper()}": str(value) for name, value in settings.items()}
        fixed = {"TETHER_OPS_PORT": "0", "TETHER_CONFIG_DIR": str(home / "no-config")}
        self.env = environment(Home.at(str(home)), {**fixed, **given})
        self.key = ""
        self.ready_s = 0.0
        """How long the last start took."""
        self._log: IO[str] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._http: httpx.Client | None = None

    # start and stop

    def up(self) -> Self:
        """Start, and wait until the platform says that it is ready.

        Raises:
            RuntimeError: it ended instead.
        """
        began = time.monotonic()
        self._close()
        self._log = (self.home / "up.out").open("a")
        words = ["up", "--data-dir", str(self.home), "--http", f"127.0.0.1:{self.port}"]
        words += ["--workers", str(self.workers), "--log-files"]
        self._process = subprocess.Popen(
            command(*words), stdout=subprocess.PIPE, stderr=self._log, text=True, env=self.env, start_new_session=True
        )
        assert self._process.stdout is not None
        if not any(line.startswith("ready") for line in self._process.stdout):
            raise RuntimeError("tether up ended: " + (self.home / "up.out").read_text()[-1500:])
        self.ready_s = time.monotonic() - began
        self.key = self.key or (self.home / "admin.key").read_text().strip()
        self._http = self.client(timeout=90)
        return self

    def down(self) -> None:
        subprocess.run(
            command("down", "--data-dir", str(self.home)), env=self.env, capture_output=True, timeout=120, check=False
        )
        self.ended(30)

    def ended(self, within_s: float = 30.0) -> None:
        """Wait for ``tether up`` to end, and end it when it does not."""
        if self._process is not None and self._process.poll() is None:
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._http is not None:
            self._http.close()
        for file in (self._log, self._process.stdout if self._process is not None else None):
            if file is not None:
                file.close()
        self._http = self._log = None

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.down()
        end_all(self.home)

    # processes

    @property
    def endpoints(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.home / "run/endpoints.json").read_text())
        return content

    def pids(self) -> dict[str, int]:
        """Every process by name; ``up`` is the supervisor."""
        try:
            found = self.endpoints
        except (OSError, ValueError):
            return {}
        return {**found["pids"], "up": found["supervisor"]}

    def send(self, name: str, number: int = signal.SIGKILL) -> bool:
        """Signal a process of this home; whether it was there."""
        pid = self.pids().get(name)
        if pid is None or not belongs(pid, self.home):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def kill(self, *names: str) -> None:
        for name in names:
            self.send(name)

    def pause(self, *names: str) -> None:
        for name in names:
            self.send(name, signal.SIGSTOP)

    def resume(self, *names: str) -> None:
        for name in names:
            self.send(name, signal.SIGCONT)

    @property
    def worker_names(self) -> list[str]:
        return [f"worker-{number + 1}" for number in range(self.workers)]

    def usage(self) -> Usage:
        found: Usage = {}
        for name, pid in self.pids().items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found[name] = round(process.memory_info().rss / 1e6, 1), process.num_fds()
        return found

    def cpu(self, seconds: float) -> dict[str, float]:
        """Percent of a core that each process took while so much time passed."""
        before = self._cpu_seconds()
        time.sleep(seconds)
        after = self._cpu_seconds()
        return {name: round((after[name] - before[name]) / seconds * 100, 1) for name in before if name in after}

    def _cpu_seconds(self) -> dict[str, float]:
        found = {}
        for name, pid in self.pids().items():
            with contextlib.suppress(psutil.Error):
                found[name] = sum(psutil.Process(pid).cpu_times()[:2])
        return found

    # what it is asked

    @property
    def http(self) -> httpx.Client:
        assert self._http is not None
        return self._http

    def client(self, *, timeout: float = 45.0, key: str = "") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key or self.key}, timeout=timeout, trust_env=False)

    def cli(self, *words: str) -> str:
        """What ``tether`` prints, errors included."""
        env = {**self.env, "TETHER_URL": self.url, "TETHER_API_KEY": self.key}
        done = subprocess.run(command(*words), capture_output=True, text=True, env=env, timeout=300, check=False)
        return done.stdout + done.stderr

    def audit(self) -> str:
        """What ``tether audit verify`` says, in a line."""
        return self.cli("audit", "verify").strip().replace("\n", " | ")[-300:]

    def push(self, name: str, content: bytes, **query: int) -> int:
        """Push a version and wait until a worker answers for it; its number."""
        answer = self.http.post(f"/v1/models/{name}/versions", content=content, params=query)
        if answer.status_code not in (200, 201):
            raise RuntimeError(f"push of {name}: {answer.status_code} {answer.text[:300]}")
        self.ready(name)
        return int(answer.json()["version"])

    def ready(self, name: str, within_s: float = 60.0) -> None:
        end = time.monotonic() + within_s
        while self.http.get(f"/v2/models/{name}/ready").status_code != 200:
            if time.monotonic() > end:
                raise RuntimeError(f"model '{name}' is not ready within {within_s:g} s")
            time.sleep(0.1)

    def monitor(self, path: str) -> Any:
        """JSON from the broker's own monitoring port."""
        return httpx.get(self.endpoints["monitor"] + path, timeout=10).json()

    def broker_streams(self) -> list[dict[str, Any]]:
        """The state of each stream, as the broker tells it."""
        found = self.monitor("/jsz?streams=1&consumers=1&config=1&accounts=1")
        return [stream for account in found["account_details"] for stream in account.get("stream_detail", [])]


def belongs(pid: int, home: Path) -> bool:
    """Whether a process is one of a home's."""
    try:
        process = psutil.Process(pid)
        return process.environ().get("TETHER_HOME") == str(home) or str(home) in " ".join(process.cmdline())
    except psutil.Error:
        return False


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def processes_below(folder: Path) -> Iterator[psutil.Process]:
    """Every process whose home is a folder or lies below it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            home = process.environ().get("TETHER_HOME", "")
            if home and Path(home).is_relative_to(folder):
                yield process


def end_all(folder: Path) -> None:
    """End what is left of a folder's platforms; something left is a failure."""
    left = list(processes_below(folder))
    for process in left:
        with contextlib.suppress(psutil.Error):
            fail(f"left behind: {process.pid} {' '.join(process.cmdline())[:100]}")
            process.kill()
