"""Python models that try to leave their process, pushed to a whole platform: as root, and as an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from support.models import models
from support.platform import escapes, platforms
from support.platform.platforms import Platform, platform

from tether import Client
from tether.errors import ModelRejected
from tether.process.os_process import alive
from tether.sandbox import plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NOBODY = 65534
USERS = ("self", "ordinary")
WITHOUT_LANDLOCK = """
import os, sys
from tether.sandbox import kernel, seccomp
kernel.control(38, 1)
seccomp.install(seccomp.without(("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def landlock() -> None:
    if lacking := plan.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"this kernel has no {lacking}")


def python_for_all() -> str:
    """A Python of this version that every user may run; empty: there is none."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for found in (sys.executable, *(f"{folder}/{name}" for folder in ("/usr/bin", "/usr/local/bin"))):
        asked = [*as_nobody(), found, "-c", "import msgspec, nats, numpy, tether"]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            if subprocess.run(asked, env=env, capture_output=True, check=False).returncode == 0:
                return found
        except OSError:
            continue
    return ""


def as_nobody() -> list[str]:
    """``env`` is started with the rights that root had, and what it starts without them."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env"]


def started_by(*prefix: str) -> Callable[..., list[str]]:
    return lambda *words: [*prefix, "-m", "tether_cli", *words]


@pytest.fixture(scope="module", params=USERS)
def running(request: pytest.FixtureRequest) -> Iterator[Platform]:
    folder = Path(tempfile.mkdtemp(prefix="tether-test-"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ordinary":
            if os.getuid() != 0:
                pytest.skip("the tests run as an ordinary user already")
            python = python_for_all()
            if not python:
                shutil.rmtree(folder)
                pytest.skip("no Python with the packages can be run by every user")
            os.chown(folder, NOBODY, NOBODY)
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            patch.setattr(platforms, "command", started_by(*as_nobody(), python))
        with platform(1, folder=folder) as made:
            push(made, folder / "bundle")
            yield made


def push(running: Platform, folder: Path) -> None:
    """The model tries everything when the model store looks at it too, and is refused when it was allowed anything."""
    plain = folder.parent / "add.onnx"
    plain.write_bytes(models.add())
    with Client(running.url, running.key) as client:
        client.push("add", plain)
        client.push("escapes", escapes.write(folder))
    wait(running, "escapes")
    wait(running, "add")


def wait(running: Platform, name: str) -> None:
    end = time.monotonic() + 60
    with httpx.Client(base_url=running.url, headers={"x-api-key": running.key}, trust_env=False) as http:
        while http.get(f"/v2/models/{name}/ready").status_code != 200:
            assert time.monotonic() < end, running.logs()
            time.sleep(0.1)


@pytest.fixture
def client(running: Platform) -> Iterator[Client]:
    with Client(running.url, running.key) as made:
        yield made


def test_a_model_leaves_its_process_in_none_of_the_ways_that_are_known(running: Platform, client: Client) -> None:
    others = [str(path) for path in running.home.cache("worker-1").glob("*/model.onnx")]
    assert others
    found = escapes.ask(client, "leave", paths=others)
    assert len(found) > 45
    assert all(found.values())
    own = (running.home.root.stat().st_uid, running.home.root.stat().st_gid)
    key = running.home.admin_key.stat()
    assert (key.st_uid, key.st_gid, key.st_mode & 0o777) == (*own, 0o600)
    assert not (running.home.run / "written").exists()


def test_a_model_is_told_nothing_of_its_worker(running: Platform, client: Client) -> None:
    here = escapes.ask(client, "here")
    assert here["parent"] == running.pids["worker-1"]
    assert here["uid"] == running.home.root.stat().st_uid
    assert not [name for name in here["environment"] if name.startswith("TETHER")]
    status = Path(f"/proc/{here['pid']}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


def test_a_model_fills_no_disk(running: Platform, client: Client) -> None:
    before = log_size(running)
    filled = escapes.ask(client, "fill")
    counted = escapes.ask(client, "count")
    assert filled["error"] == counted["error"] == "OSError"
    assert 0 < filled["written"] <= 64 << 20
    assert 0 < counted["made"] < 5000
    assert escapes.ask(client, "shout", megabytes=20) == 20
    assert log_size(running) - before < 1 << 20


def log_size(running: Platform) -> int:
    return (running.home.logs / "worker-1.log").stat().st_size


def test_an_ordinary_users_model_has_so_many_threads_and_no_more(running: Platform, client: Client) -> None:
    if running.home.root.stat().st_uid == 0:
        pytest.skip("the kernel counts no threads of root: docs/security.md says so")
    assert escapes.ask(client, "threads", most=3000) < 1100
    assert escapes.ask(client, "threads", most=100) == 100


def test_no_other_process_of_the_user_reads_a_services_memory(running: Platform) -> None:
    uid = running.home.root.stat().st_uid
    if uid == 0:
        pytest.skip("root may read everything")
    own = {name: pid for name, pid in running.pids.items() if name != "nats"}  # that is a program of others
    assert len(own) == 5
    for name, pid in own.items():
        asked = [*as_nobody(), "cat", f"/proc/{pid}/environ"]
        assert subprocess.run(asked, capture_output=True, check=False).returncode != 0, name


def test_a_model_that_never_answers_ends_with_its_worker(running: Platform, client: Client) -> None:
    here = escapes.ask(client, "here")
    client.submit("escapes", escapes.question("hang"))
    end = time.monotonic() + 30
    while Path(f"/proc/{here['pid']}/comm").read_text().strip() != "hanging":
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(here["parent"], signal.SIGKILL)
    while alive(here["pid"]):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_landlock_programs_are_refused_and_data_is_served(tmp_path: Path) -> None:
    assert sorted(plan.WITHOUT_CODE) == ["onnxruntime_onnx", "pytorch_safetensors"]
    prefix: Sequence[str] = (sys.executable, "-c", WITHOUT_LANDLOCK, sys.executable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "command", started_by(*prefix))
        with platform(1) as running, Client(running.url, running.key) as client:
            words = "programs, and this machine's kernel cannot confine them: it has no Landlock .*'model_confinement'"
            with pytest.raises(ModelRejected, match=words):
                client.push("escapes", escapes.write(tmp_path / "bundle"))
            plain = tmp_path / "add.onnx"
            plain.write_bytes(models.add())
            client.push("add", plain)
            wait(running, "add")
            lines = json.dumps(running.run("doctor").stdout)
            assert "programs are refused, the kernel has no Landlock" in lines
