"""What confines a model's process, chunk by chunk: older kernels, folders around the data directory, what a model writes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tether.errors import ModelRejected
from tether.process.data_dir import Home
from tether.sandbox import kernel, landlock, plan, seccomp, trial
from tether.settings import Settings
from tether.worker.runtimes import graph_cache
from tether.worker.runtimes.child_output import AT_ONCE, LONGEST, ModelOutputLog
from tether_cli.platform.doctor_confinement import confinement

FILTERED = """
import os, sys
from tether.sandbox import kernel, seccomp
kernel.control(38, 1)
seccomp.install(seccomp.models(os.getpid(), processes=bool(int(sys.argv[1])), abi=int(sys.argv[2])))
try:
    exec(sys.argv[3], {"os": os, "parent": os.getppid(), "kernel": kernel})
except PermissionError:
    sys.exit(7)
"""
ALLOWED, REFUSED = 0, 7

needs_seccomp = pytest.mark.skipif(not seccomp.available(), reason="this kernel has no seccomp")
needs_both = pytest.mark.skipif(bool(plan.missing()), reason=f"this kernel has no {plan.missing()}")


def filtered(code: str, *, processes: bool = False, abi: int = 7) -> int:
    words = [sys.executable, "-c", FILTERED, str(int(processes)), str(abi), code]
    return subprocess.run(words, check=False, capture_output=True, timeout=60).returncode


@needs_seccomp
@pytest.mark.parametrize(
    ("code", "abi", "found"),
    [
        ("os.kill(parent, 0)", 7, ALLOWED),  # Landlock keeps signals apart there
        ("os.kill(parent, 0)", 5, REFUSED),
        ("os.kill(os.getpid(), 0)", 5, ALLOWED),
        ("os.kill(os.getpid(), 6)", 5, -6),
        ("os.abort()", 5, -6),
        ("import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, parent)", 5, REFUSED),
        ("os.truncate('/nowhere', 0)", 2, REFUSED),
        ("os.open('/dev/null', os.O_RDONLY | os.O_TRUNC)", 1, REFUSED),
        ("os.open('/dev/null', os.O_WRONLY | os.O_TRUNC)", 1, ALLOWED),
        ("os.setpriority(os.PRIO_PROCESS, parent, 19)", 1, REFUSED),
        ("os.nice(1)", 1, ALLOWED),
        ("kernel.call('socket', 2, 1, 0)", 1, REFUSED),
        ("import asyncio; asyncio.run(asyncio.sleep(0))", 1, ALLOWED),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", 1, ALLOWED),
    ],
)
def test_a_filter_refuses_what_landlock_of_that_kernel_does_not(code: str, abi: int, found: int) -> None:
    assert filtered(code, abi=abi) == found


@needs_seccomp
def test_only_what_compiles_starts_programs_and_none_makes_namespaces() -> None:
    run = "import subprocess, sys; sys.exit(subprocess.run(['true']).returncode)"
    assert filtered(run) == REFUSED
    assert filtered(run, processes=True) == ALLOWED
    assert filtered("kernel.call('unshare', 0x10000000)", processes=True) == REFUSED
    assert filtered("kernel.call('clone', 0x10000000 | 17, 0, 0, 0, 0)", processes=True) == REFUSED


@needs_seccomp
@pytest.mark.skipif(kernel.machine() != "x86_64", reason="only x86-64 has calls in a second form")
def test_calls_in_another_form_end_the_process() -> None:
    code = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 | 39)"
    assert filtered(code) == -31


def test_both_tables_know_every_call_that_is_named() -> None:
    names = {*seccomp._REFUSED, *seccomp._ABSENT, *seccomp._PROGRAMS, *seccomp._OWN_PID_FIRST, *seccomp._SIGNALS}
    assert names <= set(kernel.NUMBERS["x86_64"])
    of_x86 = {"iopl", "ioperm", "modify_ldt", "create_module", "uselib", "inotify_init", "chmod", "chown", "lchown"}
    assert names - set(kernel.NUMBERS["aarch64"]) == of_x86
    for numbers in kernel.NUMBERS.values():
        assert len(set(numbers.values())) == len(numbers)


def readable(made: plan.ConfinementPlan) -> set[str]:
    return {path for path, rights in made.rules if rights & landlock.READ_FILE}


def test_a_folder_around_the_data_directory_is_read_by_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ./.tether in a folder from which Python imports."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in (tmp_path / "project", beside):
        path.mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(str(path))
    home = tmp_path / "project" / ".tether"
    found = readable(plan.plan(plan.ConfinementRequest(apart=str(home))))
    assert str(beside) in found
    assert str(tmp_path / "project") not in found
    assert not any(home.is_relative_to(path) for path in found)
    assert plan.hidden_paths(str(home)) == [str(tmp_path / "project")]
    with pytest.raises(ModelRejected, match="is inside Python's folder"):
        plan.plan(plan.ConfinementRequest(apart=str(Path(sys.prefix) / "lib" / "home")))


def test_the_folder_that_a_service_was_started_in_is_read_by_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    assert str(tmp_path) not in readable(plan.plan(plan.ConfinementRequest()))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert str(tmp_path) in readable(plan.plan(plan.ConfinementRequest()))


@needs_both
def test_the_trial_of_the_doctor_tells_a_confined_process_from_one_that_is_not() -> None:
    assert trial.tried(plan.REQUIRED, 16).allowed == ()
    if os.geteuid() == 0:
        assert "read files of others" in trial.tried(plan.OFF, 0).allowed


@needs_both
def test_the_doctor_says_what_there_is(tmp_path: Path) -> None:
    lines = [finding.line() for finding in confinement(Settings(), Home(tmp_path))]
    assert lines[0].startswith("ok    models: the kernel has Landlock ABI")
    assert "and was refused" in lines[1]
    (off,) = confinement(Settings(model_confinement="off"), Home(tmp_path))
    assert off.level == "warn"


def test_what_a_model_writes_is_a_few_short_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    with caplog.at_level(logging.INFO), os.fdopen(reading, "rb") as pipe:
        said = ModelOutputLog(pipe, "m", 1)
        os.write(writing, b"one\r\x1b[31m\n")
        for _ in range(2000):
            os.write(writing, b"y" * 1000 + b"\n")
        os.close(writing)
        said.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("model output: one")
    assert len(lines) < AT_ONCE + 20
    assert max(map(len, lines)) < LONGEST + 50
    assert "more lines of model output" in lines[-1]


def test_processes_keep_graphs_apart_from_other_versions_and_from_the_worker(tmp_path: Path) -> None:
    graphs, version = tmp_path / "graphs", tmp_path / ("a" * 64)
    own = graph_cache.of_process("onnxruntime_onnx", version, str(graphs))
    assert Path(own).is_relative_to(graphs)
    assert graph_cache.cache_beside(version, own, 1) is not None
    assert graph_cache.of_process("python", version, str(graphs)) == ""
    assert graph_cache.of_process("onnxruntime_onnx", Path("/elsewhere/v"), str(graphs)) == ""


def test_graphs_of_versions_that_were_not_used_make_room(tmp_path: Path) -> None:
    folders = []
    for number in range(3):
        own = Path(graph_cache.of_process("onnxruntime_onnx", tmp_path / str(number), str(tmp_path / "graphs")))
        (own / "x.graph").write_bytes(bytes(1000))
        os.utime(own, (number, number))
        folders.append(own)
    graph_cache.trim(str(folders[0]), 2500)
    assert [folder.exists() for folder in folders] == [True, False, True]
