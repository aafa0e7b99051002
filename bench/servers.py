"""Starts and stops what is measured: Tether in a folder of its own, and the bare FastAPI server, on free ports."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import msgspec
import numpy as np

from tether.process.data_dir import Home

ROOT = Path(__file__).resolve().parent.parent
READY_S = 60.0


@dataclass(frozen=True)
class Server:
    """Something that answers inferences of the digits model."""

    url: str
    key: str = ""
    home: Home | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"x-api-key": self.key} if self.key else {}

    @property
    def infer_url(self) -> str:
        return f"{self.url}/v2/models/digits/infer"


def environment() -> dict[str, str]:
    """This process's environment without settings of another platform, and with the sources importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TETHER_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    return kept


def wait_for(url: str, headers: dict[str, str] | None = None, until_s: float = READY_S) -> None:
    """Poll until ``url`` answers 200.

    Raises:
        TimeoutError: it did not in ``until_s`` seconds.
    """
    end = time.monotonic() + until_s
    last = "no answer"
    pause = threading.Event()
    with httpx.Client(trust_env=False, headers=headers, timeout=5) as http:
        while time.monotonic() < end:
            try:
                answer = http.get(url)
                if answer.status_code == 200:
                    return
                last = f"{answer.status_code} {answer.text}"
            except httpx.TransportError as error:
                last = repr(error)
            pause.wait(0.05)
    raise TimeoutError(f"{url} was not ready in {until_s:g} s: {last}")


@contextmanager
def bare_fastapi(parser: Literal["h11", "httptools"]) -> Iterator[Server]:
    """The comparison server with one of uvicorn's two HTTP parsers; gone when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.fastapi_server", "--port", str(port), "--http", parser],
        cwd=ROOT,
        env=environment(),
    )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        wait_for(f"{server.url}/healthz")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tether(folder: Path, *words: str, **settings: str) -> None:
    """Run a ``tether`` command on the data directory ``folder``; ``settings`` other than the default, in lower case.

    Raises:
        RuntimeError: it failed; the message has what it wrote.
    """
    command = [sys.executable, "-m", "tether_cli", *words, "--data-dir", str(folder)]
    own = {f"TETHER_{name.upper()}": value for name, value in settings.items()}
    done = subprocess.run(
        command, cwd=folder, env=environment() | own, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in (folder / "logs").glob("*.log"))
        raise RuntimeError(f"tether {words[0]} failed: {done.stderr}\n{logs}")


@contextmanager
def tether_platform(workers: int = 2, **settings: str) -> Iterator[Server]:
    """The whole platform with the digits model pushed; gone when the block ends. ``settings`` as for :func:`tether`."""
    folder = Path(tempfile.mkdtemp(prefix="tether-bench-"))
    try:
        tether(folder, "up", "--detach", "--http", "127.0.0.1:0", "--workers", str(workers), **settings)
        home = Home.at(str(folder))
        url = msgspec.json.decode(home.endpoints.read_bytes())["http"]
        server = Server(url, home.admin_key.read_text().strip(), home)
        push(server, "digits", ROOT / "examples" / "digits" / "digits.onnx")
        yield server
    finally:
        tether(folder, "down")
        shutil.rmtree(folder, ignore_errors=True)


def push(server: Server, name: str, path: Path) -> None:
    """Push a model and wait until a worker serves it."""
    with httpx.Client(trust_env=False, headers=server.headers, timeout=120) as http, path.open("rb") as file:
        http.post(f"{server.url}/v1/models/{name}/versions", content=file).raise_for_status()
    wait_for(f"{server.url}/v2/models/{name}/ready", server.headers)


def request_body() -> bytes:
    """One image as JSON, as a client would write it."""
    image = np.load(ROOT / "examples" / "digits" / "digits_holdout.npz", allow_pickle=False)["images"][0]
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()
