"""The README's commands, up to the containers, run as they stand, one after the other, in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.platform.platforms import ROOT, environment

from tether.process.data_dir import Home
from tether.process.operations_server import bind
from tether.process.os_process import alive

HOLDOUT = ROOT / "examples/digits/digits_holdout.npz"


def commands() -> list[str]:
    """Every line of the shell blocks before the chapter about containers, without those that install."""
    page = (ROOT / "README.md").read_text().partition("\n## In containers")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("make ")]


class Reader:
    """Somebody who types what the README says into a shell, in a clone with everything installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home.at(str(folder / ".tether"))
        self.port = str(bind("127.0.0.1", 0))
        programs = folder / "bin"
        programs.mkdir()
        for name, words in (("python", ""), ("tether", " -m tether_cli")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
            (programs / name).chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        ports = {"TETHER_HTTP_PORT": self.port, "TETHER_OPS_PORT": "0"}
        self.environment = environment(self.home, {"PATH": path, **ports})

    def types(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run one line; port 8000 may be somebody else's here, so another one takes its place."""
        return subprocess.run(
            ["/bin/bash", "-c", line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    someone = Reader(tmp_path)
    yield someone
    pids = [int(path.read_text()) for path in someone.home.run.glob("*.pid")]
    assert someone.types("tether down").returncode == 0
    assert not [pid for pid in pids if alive(pid)]


@pytest.mark.slow
def test_what_the_readme_says_to_type_works(reader: Reader) -> None:
    said: dict[str, str] = {}
    for line in commands():
        if line.startswith("curl") and shutil.which("curl") is None:
            continue
        done = reader.types(line)
        # right after a kill, status says with its exit status that a worker is still starting
        assert done.returncode == 0 or line == "tether status", f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout + done.stderr
    labels = np.resize(np.load(HOLDOUT, allow_pickle=False)["labels"], 10_000)
    assert re.search(rf"^label +\[{labels[0]}\]$", said["tether infer digits image.npy"], re.MULTILINE)
    assert all('"outputs"' in answer for line, answer in said.items() if line.startswith("curl"))
    with np.load(reader.folder / "labels.npz", allow_pickle=False) as saved:
        assert len(saved["label"]) == len(labels)
        assert float((saved["label"] == labels).mean()) > 0.95
    told = said["tether job wait - --output labels.npz < jobs.txt"]
    assert re.search(r"10,000 of 10,000 jobs succeeded(, \d+ of them after a retry)?", told), told
    assert re.search(r"^worker-1 +\d+ .* 1$", said["tether status"], re.MULTILINE), "it was restarted"
    assert "worker-1 was restarted: killed by signal 9 (Killed)" in said["tether status"]
    assert list(said)[-1] == "tether down"
