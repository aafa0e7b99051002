"""A worker's process that dies, and what the next one knows of it: each is a real process, ended by a real signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import models

from tether.domain.manifest import ModelRef
from tether.process.os_process import out_of_memory_kills
from tether.worker.crash_notes import CrashNotes

GUILTY, BESIDE = ModelRef("guilty", 3), ModelRef("beside", 1)

WORKER = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tether.domain.manifest import ModelRef
from tether.process.os_process import signal_stack
from tether.worker.crash_notes import CrashNotes

notes = CrashNotes(Path(sys.argv[1]), "w")
notes.watch()
notes.beat()
with notes.running(ModelRef("over", 1)):
    pass
begun = threading.Event()

def beside():
    with notes.running(ModelRef("beside", 1)):
        begun.set()
        time.sleep(60)

threading.Thread(target=beside, daemon=True).start()
begun.wait()

def guilty():
    with notes.running(ModelRef("guilty", 3)):
{run}

ThreadPoolExecutor(1, initializer=signal_stack).submit(guilty).result()
"""

DIVIDE = """
        import numpy as np, onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[2])
        session.run(None, {"x": np.array([123_454_321], np.int32)})
"""
OVERFLOW = """
        sys.setrecursionlimit(10**9)
        nested = []
        for _ in range(10**6):
            nested = [nested]
        repr(nested)
"""


def die(folder: Path, run: str) -> int:
    path = folder / "model.onnx"
    path.write_bytes(models.dividing())
    code = WORKER.replace("{run}", run)
    return subprocess.run([sys.executable, "-c", code, str(folder), str(path)], check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("run", "number", "how"),
    [
        (DIVIDE, signal.SIGFPE, "Floating point exception"),
        (OVERFLOW, signal.SIGSEGV, "Segmentation fault"),
        ("        os.kill(os.getpid(), signal.SIGABRT); time.sleep(60)", signal.SIGABRT, "Aborted"),
        ("        import ctypes; ctypes.CDLL(None).abort()", signal.SIGABRT, "Aborted"),
    ],
    ids=["division", "stack", "sent", "abort"],
)
def test_a_signal_names_the_version_whose_thread_it_met(
    tmp_path: Path, run: str, number: signal.Signals, how: str
) -> None:
    assert die(tmp_path, run) == -number
    after = CrashNotes(tmp_path, "w")
    assert after.crashed[GUILTY] == f"a run of the model ended worker 'w': {how}"
    assert ModelRef("over", 1) not in after.crashed
    # a signal that another process sent is handled by any thread, so that all that ran are suspected
    assert (BESIDE in after.crashed) <= ("os.kill" in run)


def test_who_is_killed_blames_nobody(tmp_path: Path) -> None:
    assert die(tmp_path, "        os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert CrashNotes(tmp_path, "w").crashed == {}


def test_what_ran_when_the_kernel_ran_out_of_memory_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = out_of_memory_kills()
    assert die(tmp_path, "        os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    monkeypatch.setattr("tether.worker.crash_notes.out_of_memory_kills", lambda: before + 1)
    assert CrashNotes(tmp_path, "w").crashed == dict.fromkeys(
        (GUILTY, BESIDE), "a run of the model ended worker 'w': out of memory"
    )


def test_it_is_remembered_for_good_and_another_worker_knows_nothing_of_it(tmp_path: Path) -> None:
    die(tmp_path, DIVIDE)
    CrashNotes(tmp_path, "w").close()
    again = CrashNotes(tmp_path, "w")
    assert list(again.crashed) == [GUILTY]
    assert CrashNotes(tmp_path, "other").crashed == {}
    again.close()
    assert not list(tmp_path.glob("w.running"))


def test_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    notes = CrashNotes(tmp_path, "w")
    with notes.running(GUILTY), notes.running(BESIDE):
        pass
    notes.close()
    assert CrashNotes(tmp_path, "w").crashed == {}


@pytest.mark.parametrize("content", [b"", b"\xff" * 70_000, b"12\n", b"x" * 128 + b"1 no-version\n" + b"\0" * 500])
def test_damaged_files_say_nothing(tmp_path: Path, content: bytes) -> None:
    for name in ("w.running", "w.crash", "w.crashed.json"):
        (tmp_path / name).write_bytes(content)
    assert CrashNotes(tmp_path, "w").crashed == {}


def test_more_runs_than_there_are_lines_go_on_unseen(tmp_path: Path) -> None:
    notes = CrashNotes(tmp_path, "w")
    entered = [notes.running(GUILTY) for _ in range(600)]
    for one in entered:
        one.__enter__()
    for one in entered:
        one.__exit__(None, None, None)
    assert len(notes._free) == 511
    notes.close()
    with notes.running(GUILTY):
        pass
