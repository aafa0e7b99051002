"""The scripts start, test and stop the platform, as often as one likes, and leave no process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.platform.platforms import ROOT, Platform, environment

from tether.process.data_dir import Home
from tether.process.os_process import alive

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Iterator[Run]:
    """Run a script as in a checkout whose environment is this one."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, words in (("python", '"$@"'), ("tether", '-m tether_cli "$@"')):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}\n')
        (folder / name).chmod(0o755)

    def start(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        variables = environment(home, {"VENV": str(folder.parent)})
        script = [str(ROOT / "scripts" / name), *words]
        return subprocess.run(script, env=variables, capture_output=True, text=True, timeout=100, check=False)

    yield start
    start("stop-services.sh")


def test_start_test_and_stop_work_twice_in_a_row(home: Home, run: Run) -> None:
    for _ in range(2):
        first = run("start-services.sh", "--http", "127.0.0.1:0", "--workers", "1")
        assert first.returncode == 0, first.stderr
        pids = Platform(home).pids
        again = run("start-services.sh")
        assert again.returncode == 0
        assert "runs already" in again.stderr
        assert Platform(home).pids == pids
        assert all((home.run / f"{name}.pid").read_text() == f"{pid}\n" for name, pid in pids.items())
        assert {f"{name}.log" for name in pids} <= {path.name for path in home.logs.iterdir()}
        tested = run("test-platform.sh")
        assert (tested.returncode, tested.stdout) == (0, "passed\n"), tested.stderr
        assert run("stop-services.sh").returncode == 0
        assert run("stop-services.sh").returncode == 0
        assert not [name for name, pid in pids.items() if alive(pid)]


def test_the_platform_test_starts_and_stops_what_it_needs(home: Home, run: Run) -> None:
    tested = run("test-platform.sh", "--http", "127.0.0.1:0", "--workers", "1")
    assert (tested.returncode, tested.stdout) == (0, "passed\n"), tested.stderr
    assert not home.endpoints.exists()


def test_scripts_can_be_started_from_anywhere() -> None:
    for path in (ROOT / "scripts").glob("*.sh"):
        assert os.access(path, os.X_OK), path
        assert "set -euo pipefail" in path.read_text()
