"""The platform of compose.yaml answers from containers, and goes on when a worker's container is killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.brokers.brokers import wait_until

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(420)]


def compose_command() -> list[str]:
    """Compose as a plugin of Docker, else the program of its own that Debian packages."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    alone = shutil.which("docker-compose")
    return [alone] if alone else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Stack:
    """One project of compose.yaml, with its own volumes and networks."""

    command: list[str]
    project: str
    port: int
    environment: dict[str, str]

    def run(self, *words: str, timeout_s: float = 180) -> str:
        """Run a compose command; its stdout."""
        base = [*self.command, "--project-name", self.project, "--file", str(ROOT / "compose.yaml")]
        return self._run([*base, *words], timeout_s)

    def docker(self, *words: str) -> str:
        """Run a docker command; its stdout."""
        return self._run([shutil.which("docker") or "docker", *words], 60)

    def _run(self, command: list[str], timeout_s: float) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
        return done.stdout

    def containers(self) -> list[str]:
        """Ids of this project's containers, stopped ones included."""
        mine = f"label=com.docker.compose.project={self.project}"
        return self.docker("ps", "--all", "--quiet", "--filter", mine).split()


@pytest.fixture
def stack() -> Iterator[Stack]:
    """The platform, up; its logs are shown when the test fails and nothing of it stays."""
    command = compose_command()
    image, nats = os.environ.get("TETHER_TEST_IMAGE"), os.environ.get("TETHER_TEST_NATS_IMAGE")
    if not command or image is None or nats is None:
        reason = "needs Docker with Compose and the images of scripts/build-images.sh: run scripts/with-docker.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TETHER_")}
    environment |= {"SERVICE_IMAGE": image, "NATS_IMAGE": nats, "HTTP_PORT": str(port)}
    stack = Stack(command, f"tether-test-{os.getpid()}", port, environment)
    try:
        stack.run("up", "--detach", "--no-build")
        yield stack
    finally:
        sys.stdout.write(stack.run("logs", "--no-color", "--tail", "40"))
        stack.run("down", "--volumes", "--timeout", "10")


def ready(http: httpx.AsyncClient, path: str) -> Callable[[], Awaitable[bool]]:
    """Whether a path answers 200 by now."""

    async def check() -> bool:
        try:
            return (await http.get(path, timeout=5)).status_code == 200
        except httpx.TransportError:
            return False

    return check


async def infer(http: httpx.AsyncClient, image: list[float]) -> int:
    """The label that the model gives one image."""
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image}]}
    answer = await http.post("/v2/models/digits/infer", json=body)
    assert answer.status_code == 200, answer.text
    outputs: dict[str, Any] = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    return int(outputs["label"][0])


async def test_containers_answer_and_survive_a_killed_worker(stack: Stack) -> None:
    holdout = np.load(DIGITS / "digits_holdout.npz", allow_pickle=False)
    image, label = holdout["images"][0].tolist(), int(holdout["labels"][0])
    address = f"http://127.0.0.1:{stack.port}"
    async with httpx.AsyncClient(base_url=address, timeout=35, trust_env=False) as http:
        await wait_until(ready(http, "/readyz"), "the gateway is ready", 120)
        http.headers["x-api-key"] = stack.run("run", "--rm", "-T", "admin").strip().splitlines()[-1]
        pushed = await http.post("/v1/models/digits/versions", content=(DIGITS / "digits.onnx").read_bytes())
        assert pushed.status_code == 201, pushed.text
        await wait_until(ready(http, "/v2/models/digits/ready"), "a worker has loaded the model", 60)
        assert await infer(http, image) == label
        stack.run("kill", "-s", "SIGKILL", "worker-1")
        assert [await infer(http, image) for _ in range(20)] == [label] * 20
    described = json.loads(stack.docker("inspect", *stack.containers()))
    ports = [bound for item in described for bound in (item["NetworkSettings"]["Ports"] or {}).values() if bound]
    assert [bound[0]["HostIp"] for bound in ports] == ["127.0.0.1"], "only the gateway is published, on loopback"
    stack.run("down", "--volumes", "--timeout", "10")
    assert stack.containers() == []
