"""One command keeps a platform of real processes running, and one command ends all of them."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.platforms import Platform, command, environment, platform, tether

from tether.process.data_dir import Home
from tether.process.os_process import alive, send

PARTS = ("nats", "modelstore", "dispatcher", "worker-1", "gateway")


@pytest.fixture(scope="module")
def running() -> Iterator[Platform]:
    with platform(workers=1) as started:
        yield started


def test_everything_is_ready_when_up_returns(running: Platform) -> None:
    found = running.status()
    assert found["ready"]
    assert {row["name"] for row in found["processes"]} == set(PARTS)
    assert all(row["alive"] and row["ready"] for row in found["processes"])
    assert httpx.get(f"{running.url}/readyz").status_code == 200


def test_status_tells_processes_workers_models_and_queues(running: Platform, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(models.add())
    assert running.run("model", "push", "plus", str(tmp_path / "m.onnx")).returncode == 0
    found = running.status()
    broker = found["broker"]
    assert broker["durability"] == "fast"
    assert broker["version"].startswith("2.")
    assert {"TETHER_JOBS_0", "TETHER_RESULTS"} <= {stream["name"] for stream in broker["streams"]}
    assert set(found["queues"]) == {"jobs", "requests", "results", "dead_letters"}
    assert [row["name"] for row in found["models"]] == ["plus"]
    assert [row["name"] for row in found["workers"]] == ["worker-1"]
    words = running.run("status")
    assert words.returncode == 0
    for line in ("waiting ", "durable jobs 0, with requests 0", "dead letters 0", "gateway ", "worker-1 ", "plus "):
        assert line in words.stdout
    assert "TETHER_RESULTS" not in words.stdout
    assert "TETHER_RESULTS" in running.run("status", "--streams").stdout


def test_the_admin_key_works_and_only_its_owner_can_read_it(running: Platform) -> None:
    assert stat.S_IMODE(running.home.admin_key.stat().st_mode) == 0o600
    headers = {"x-api-key": running.key}
    assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{running.url}/v1/models", headers={"x-api-key": "tk_no"}).status_code == 401


@pytest.mark.parametrize("name", PARTS)
async def test_a_killed_process_is_started_again_where_it_was(running: Platform, name: str) -> None:
    before = running.endpoints
    send(before["pids"][name], signal.SIGKILL)
    await wait_until(lambda: running.endpoints["pids"][name] != before["pids"][name], f"{name} is started again", 20)
    await wait_until(running.ready, f"everything is ready after {name} was killed", 40)
    after = running.endpoints
    assert after["restarts"][name] == before["restarts"][name] + 1
    assert (after["http"], after["nats"], after["ports"]) == (before["http"], before["nats"], before["ports"])


def test_a_second_up_on_the_same_home_is_refused(running: Platform) -> None:
    for words in (["up"], ["up", "--detach"]):
        done = running.run(*words)
        assert done.returncode == 1
        assert "already runs" in done.stderr
        assert done.stdout == ""


def test_doctor_finds_nothing_wrong(running: Platform) -> None:
    done = running.run("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 0, findings
    assert {finding["level"] for finding in findings} <= {"ok", "warn"}
    assert sum("permissions:" in finding["what"] for finding in findings) == 5


def test_doctor_names_a_key_that_others_can_read(running: Platform) -> None:
    seed = running.home.nats_seed("admin")
    seed.chmod(0o644)
    try:
        done = running.run("doctor")
    finally:
        seed.chmod(0o600)
    assert done.returncode == 1
    assert f"chmod 600 {seed}" in done.stdout


async def test_a_killed_supervisor_takes_everything_with_it_and_up_starts_anew() -> None:
    with platform(workers=1) as started:
        pids = started.pids
        send(pids["up"], signal.SIGKILL)
        await wait_until(lambda: not any(map(alive, pids.values())), "every process is gone")
        again = started.run("up", "--detach", "--http", "127.0.0.1:0", "--workers", "1")
        assert again.returncode == 0, again.stderr + started.logs()
        assert again.stdout.startswith("ready http://127.0.0.1:")


def test_down_ends_every_process_and_may_be_run_twice() -> None:
    with platform(workers=1) as started:
        pids = started.pids
        first, second = started.run("down"), started.run("down")
        assert (first.returncode, second.returncode) == (0, 0)
        assert "stopped" in first.stderr
        assert "nothing runs" in second.stderr
        assert not [name for name, pid in pids.items() if alive(pid)]
        assert not list(started.home.run.glob("*.pid"))
        assert started.run("status").returncode == 1


async def test_model_stores_share_the_partitions_and_one_takes_over_anothers() -> None:
    with platform(
        workers=1, env={"TETHER_MODEL_STORES": "2", "TETHER_PARTITIONS": "4", "TETHER_PARTITION_LEASE_S": "2"}
    ) as started:
        ports = started.endpoints["ports"]

        def owned(name: str) -> float:
            return metric(ports[name], "tether_partitions")

        await wait_until(lambda: owned("modelstore") == owned("modelstore-2") == 2, "each has two partitions", 20)
        first = started.pids["modelstore"]
        send(first, signal.SIGSTOP)
        try:
            await wait_until(lambda: owned("modelstore-2") == 4, "the other has all of them", 20)
        finally:
            send(first, signal.SIGCONT)
        await wait_until(lambda: owned("modelstore") == owned("modelstore-2") == 2, "they share again", 20)


def metric(port: int, name: str) -> float:
    """A value that a service of this machine tells; the sum where it has labels."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.partition(" ")[0].partition("{")[0] == name)


def test_up_uses_a_broker_that_runs_already(broker: Broker) -> None:
    started = Platform(broker.home)
    try:
        done = started.run("up", "--detach", "--nats", broker.url, "--http", "127.0.0.1:0", "--workers", "1")
        assert done.returncode == 0, done.stderr + started.logs()
        assert started.endpoints["nats"] == broker.url
        assert set(started.endpoints["pids"]) == set(PARTS) - {"nats"}
        assert started.ready()
    finally:
        assert started.run("down").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_foreground_stops_everything_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    home = Home(tmp_path)
    words = command("up", "--http", "127.0.0.1:0", "--workers", "1")
    with subprocess.Popen(
        words, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    ) as up:
        assert up.stdout is not None
        try:
            assert up.stdout.readline().startswith("ready http://127.0.0.1:")
            pids = Platform(home).pids
            up.send_signal(number)
            assert up.wait(30) == 0
            assert up.stdout.read() == ""
            assert not [name for name, pid in pids.items() if alive(pid)]
        finally:
            up.kill()


def test_at_a_terminal_up_says_what_to_do_next_and_logs_text(tmp_path: Path) -> None:
    home = Home(tmp_path)
    here, there = pty.openpty()
    words = command("up", "--http", "127.0.0.1:0", "--workers", "1")
    with subprocess.Popen(words, env=environment(home), stdout=there, stderr=there, process_group=0) as up:
        os.close(there)
        shown = ""
        try:
            with suppress(OSError):  # the terminal has no other end any more
                while part := os.read(here, 4096).decode():
                    shown += part
                    if "tether down" in shown:
                        up.send_signal(signal.SIGINT)
            assert up.wait(30) == 0
        finally:
            up.kill()
            os.close(here)
    for said in (
        "ready http://127.0.0.1:",
        str(home.admin_key),
        "tether model push NAME FILE",
        f"tether down --data-dir {home.root}",
    ):
        assert said in shown
    assert "INFO    gateway listening" in shown
    assert "{" not in shown


@pytest.mark.parametrize("more", [(), ("--detach",)])
def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path, more: tuple[str, ...]) -> None:
    started = Platform(Home(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = started.run("up", "--http", address, *more)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"cannot listen on {address}: Address already in use; choose another with --http HOST:PORT" in line
    assert line.count(" (") == 2  # the port 0 and the code
    assert not started.home.nats_config.exists()


def test_a_start_that_fails_is_rolled_back_and_says_why(tmp_path: Path) -> None:
    home = Home(tmp_path)
    env = {"TETHER_OPS_HOST": "192.0.2.1"}  # no machine has this address
    done = tether(home, "up", "--detach", "--http", "127.0.0.1:0", "--workers", "1", env=env)
    assert done.returncode == 1
    assert "cannot listen on 192.0.2.1:" in done.stderr
    assert not is_running(home)


def is_running(home: Home) -> bool:
    """Whether any process of this machine was started with the home in its environment."""
    wanted = f"TETHER_HOME={home.root}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid() and alive(int(folder.name)):
            try:
                words = (folder / "environ").read_bytes()
            except OSError:
                continue
            if wanted in words.split(b"\0"):
                return True
    return False
