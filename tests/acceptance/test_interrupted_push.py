"""Pushes whose client or gateway is killed on the way, on a platform of real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
from support.http.served import until
from support.models import models
from support.platform.platforms import Platform, environment, platform

from tether import Client
from tether.client.pushing.local_model import LocalFile, local_model
from tether.process.os_process import send

PUSHER = """
import sys
from tether import Client

url, key, name, path = sys.argv[1:]


def told(done):
    print(done, flush=True)
    sys.stdin.readline()


with Client(url, key) as client:
    client.push(name, path, progress=told)
"""
"""Says how many bytes are there before the first chunk and after each, and waits for a line each time; others may be on their way."""


@pytest.fixture(scope="module")
def running() -> Iterator[Platform]:
    with platform(workers=1) as started:
        yield started


def model(folder: Path, seed: int) -> LocalFile:
    """A file of several chunks that no other file has."""
    path = folder / f"{seed}.onnx"
    path.write_bytes(models.padded(8 << 20, seed=seed))
    (described,) = local_model(path).files
    assert len(described.chunks) > 3
    return described


class Pusher:
    """A process that pushes, and that stops after each chunk that has come."""

    def __init__(self, running: Platform, name: str, file: LocalFile) -> None:
        words = [sys.executable, "-c", PUSHER, running.url, running.key, name, str(file.source)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environment(running.home), stdin=pipe, stdout=pipe, stderr=pipe)
        self._to, self._back = self._pipe(self.process.stdin), self._pipe(self.process.stdout)

    @staticmethod
    def _pipe(end: IO[bytes] | None) -> IO[bytes]:
        assert end is not None
        return end

    def there(self) -> int:
        """Bytes that the store has, as the process was told."""
        return int(self._back.readline())

    def go(self) -> None:
        """Let it go on to the next chunk."""
        self._to.write(b"\n")
        self._to.flush()

    def finish(self) -> tuple[int, str]:
        """Let it send the rest: its exit status and last words."""
        _, errors = self.process.communicate(timeout=90)
        return self.process.returncode, errors.decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def versions(running: Platform, name: str) -> list[int]:
    with Client(running.url, running.key) as client:
        return [int(found["version"]) for found in client.model(name)["versions"]]


def missing(running: Platform, name: str, file: LocalFile) -> list[str]:
    """Chunks that the store does not have."""
    body = {"chunks": [digest for digest, _, _ in file.chunks]}
    headers = {"x-api-key": running.key}
    answer = httpx.post(f"{running.url}/v1/models/{name}/chunks:missing", json=body, headers=headers, trust_env=False)
    return list(answer.json()["missing"])


def answers(running: Platform, name: str) -> tuple[int, float]:
    """The version that answers for ``latest``, and what it says."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}]}
    headers = {"x-api-key": running.key}
    answer = httpx.post(
        f"{running.url}/v2/models/{name}/infer", json=body, headers=headers, timeout=30, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return int(told["model_version"]), float(told["outputs"][0]["data"][0])


def ready(running: Platform) -> bool:
    try:
        return httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def pushed(running: Platform, name: str, file: LocalFile) -> dict[str, Any]:
    """Push as the command line does, and wait until the version answers."""
    with Client(running.url, running.key) as client:
        told = client.push(name, file.source)

    def served() -> bool:
        try:
            return answers(running, name)[0] == int(told["version"])
        except (AssertionError, httpx.HTTPError):
            return False

    until(served, f"version {told['version']} answers", 40)
    return told


@pytest.mark.timeout(300)
def test_a_client_killed_at_any_chunk_changes_nothing_and_the_next_one_goes_on(
    running: Platform, tmp_path: Path
) -> None:
    name, first, second = "killed", model(tmp_path, 1), model(tmp_path, 2)
    pushed(running, name, first)
    before, sizes = answers(running, name), {digest: size for digest, _, size in second.chunks}
    left = missing(running, name, second)
    assert len(left) == len(second.chunks)
    killed = 0
    while left:
        pusher = Pusher(running, name, second)
        there = pusher.there()
        assert there >= second.size - sum(sizes[digest] for digest in left), "what came stays"
        if killed:
            pusher.go()
            assert pusher.there() > there
        pusher.kill()
        killed += 1
        before_it, left = left, missing(running, name, second)
        assert set(left) < set(before_it) if killed > 1 else set(left) <= set(before_it)
        assert versions(running, name) == [1]
        assert answers(running, name) == before
    assert killed > 2, "it was killed before the first chunk, and between others"
    told = pushed(running, name, second)
    assert (told["version"], told["stored_bytes"]) == (2, 0)
    assert answers(running, name)[1] != before[1]


@pytest.mark.timeout(300)
def test_a_gateway_killed_before_between_or_after_the_chunks_is_a_delay_and_no_second_version(
    running: Platform, tmp_path: Path
) -> None:
    name = "survived"
    pushed(running, name, model(tmp_path, 3))
    for version, part in ((2, 0.0), (3, 0.5), (4, 1.0)):
        file, old = model(tmp_path, 10 + version), answers(running, name)
        pusher = Pusher(running, name, file)
        for _ in range(int(part * len(file.chunks))):
            pusher.there()
            pusher.go()
        pusher.there()
        victim = running.pids["gateway"]
        send(victim, signal.SIGKILL)
        until(lambda victim=victim: running.pids["gateway"] != victim and ready(running), "the gateway is back", 60)
        assert (versions(running, name), answers(running, name)) == (list(range(1, version)), old)
        status, words = pusher.finish()
        assert status == 0, words
        assert versions(running, name) == list(range(1, version + 1))
        told = pushed(running, name, file)
        assert (told["version"], told["stored_bytes"]) == (version, 0)
        with Client(running.url, running.key) as client:
            client.pull(name, tmp_path / "pulled" / str(version), version=version)
        assert (tmp_path / "pulled" / str(version) / "model.onnx").read_bytes() == file.source.read_bytes()
