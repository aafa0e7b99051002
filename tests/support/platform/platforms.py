"""A whole platform of real processes for a test, driven through the ``tether`` command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tether.process.data_dir import Home
from tether.process.os_process import alive, send

ROOT = Path(__file__).parents[3]

NO_MORE: Mapping[str, str] = MappingProxyType({})
FAST: Mapping[str, str] = MappingProxyType({"TETHER_DURABILITY": "fast"})
"""Nobody pulls the plug of a test, and a disk that is shared syncs slowly."""


def environment(home: Home, more: Mapping[str, str] = NO_MORE) -> dict[str, str]:
    """This process's environment with the sources importable and ``home`` as the data directory."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("TETHER_")}
    paths = [str(ROOT), str(ROOT / "cli"), *filter(None, [found.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths), "TETHER_HOME": str(home.root), **FAST, **more}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tether_cli", *words]


def tether(home: Home, *words: str, env: Mapping[str, str] = NO_MORE) -> subprocess.CompletedProcess[str]:
    """Run ``tether`` to its end; ``env`` is added to its environment."""
    return subprocess.run(
        command(*words), env=environment(home, env), capture_output=True, text=True, timeout=100, check=False
    )


@dataclass
class Platform:
    """What ``tether up --detach`` started on ``home``."""

    home: Home

    @property
    def endpoints(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.home.endpoints.read_bytes())
        return content

    @property
    def url(self) -> str:
        return str(self.endpoints["http"])

    @property
    def key(self) -> str:
        return self.home.admin_key.read_text().strip()

    @property
    def pids(self) -> dict[str, int]:
        """Every process by name; ``up`` is the supervisor."""
        found = self.endpoints
        return {"up": found["supervisor"], **found["pids"]}

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return content

    def ready(self) -> bool:
        """Whether every process lives and says that it is ready."""
        found = self.status()
        return bool(found["running"]) and all(row["alive"] and row["ready"] for row in found["processes"])

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return tether(self.home, *words)

    def logs(self) -> str:
        """The end of every log, for a test that failed."""
        parts = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.home.logs.glob("*.log"))]
        return "\n".join(parts)


@contextlib.contextmanager
def platform(workers: int = 2, env: Mapping[str, str] = NO_MORE, *, folder: Path | None = None) -> Iterator[Platform]:
    """Everything on free ports in a folder of its own, or in ``folder``; nothing of it is left afterwards."""
    folder = folder or Path(tempfile.mkdtemp(prefix="tether-test-"))
    home = Home.at(str(folder))
    running = Platform(home)
    pids: list[int] = []
    try:
        done = tether(home, "up", "--detach", "--http", "127.0.0.1:0", "--workers", str(workers), env=env)
        assert done.returncode == 0, f"{done.stderr}\n{running.logs()}"
        pids = list(running.pids.values())
        yield running
    finally:
        with contextlib.suppress(OSError, ValueError):
            pids += running.pids.values()
        stopped = tether(home, "down")
        left = [pid for pid in pids if alive(pid)]
        for pid in left:
            send(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr
    assert not left, f"processes were left behind: {left}"
