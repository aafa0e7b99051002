"""A folder in memory: proven to be there, one process's own, and gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tether.errors import TmpfsUnavailable
from tether.process import tmpfs_folder
from tether.process.tmpfs_folder import MemoryFolder, in_memory

SHM = Path("/dev/shm")  # noqa: S108 - that is the place

pytestmark = pytest.mark.skipif(not in_memory(SHM), reason="no tmpfs at /dev/shm here")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    MemoryFolder(str(SHM), tmp_path, "w").sweep()


def test_only_tmpfs_is_memory(tmp_path: Path) -> None:
    assert in_memory(SHM)
    assert not in_memory(tmp_path)
    assert not in_memory(Path("/proc"))
    assert not in_memory(Path("/no/such/place"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /a rw - tmpfs x rw", True),
        ("1 0 0:1 / / rw - tmpfs x rw\n2 1 0:2 / /a rw - ext4 x rw", False),
        ("1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /a rw - tmpfs x rw\n3 1 0:3 / /a rw - xfs x rw", False),
        ("1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /ab rw - tmpfs x rw", False),
        ("1 0 0:1 / / rw shared:1 master:2 - ext4 x rw\n2 1 0:2 / /a rw shared:3 - ramfs x rw", True),
    ],
)
def test_the_last_mount_on_the_nearest_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, expected: bool
) -> None:
    (tmp_path / "a").mkdir()
    where = str(tmp_path.resolve()).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(rows.replace(" /a", f" {where}/a"))
    monkeypatch.setattr(tmpfs_folder, "_MOUNTS", tmp_path / "mountinfo")
    assert in_memory(tmp_path / "a") is expected


def test_a_folder_is_private_and_gone_when_it_is_closed(home: Path) -> None:
    folder = MemoryFolder(str(SHM), home, "w")
    path = folder.path()
    assert path == folder.path()
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
    (path / "model").write_bytes(b"secret")
    folder.close()
    folder.close()
    assert not path.parent.exists(), "nothing is left of it"
    again = folder.path()
    assert again != path
    folder.close()


def test_a_disk_is_refused_without_telling_its_path(tmp_path: Path) -> None:
    with pytest.raises(TmpfsUnavailable, match="decrypted_model_dir") as refused:
        MemoryFolder(str(tmp_path), tmp_path, "w").path()
    assert str(tmp_path) not in refused.value.message
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(home: Path) -> None:
    folder = MemoryFolder(str(SHM), home, "w")
    folder.room(1)
    with pytest.raises(TmpfsUnavailable, match="larger"):
        folder.room(1 << 60)
    folder.close()


def test_a_place_that_others_may_enter_or_prepared_is_refused(home: Path) -> None:
    folder = MemoryFolder(str(SHM), home, "w")
    own = folder._own
    own.mkdir(mode=0o755)
    try:
        own.chmod(0o755)
        with pytest.raises(TmpfsUnavailable, match="others may enter"):
            folder.path()
        own.rmdir()
        own.symlink_to(home)
        with pytest.raises(TmpfsUnavailable, match="others may enter"):
            folder.path()
        assert not list(home.iterdir())
    finally:
        own.unlink()


CHILD = """
import pathlib, signal, sys
from tether.process.tmpfs_folder import MemoryFolder
path = MemoryFolder("/dev/shm", pathlib.Path(sys.argv[1]), "w").path()
(path / "model").write_bytes(b"secret")
print(path, flush=True)
signal.pause()
"""


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(home: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(home)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        paths = [Path(child.stdout.readline().strip()) for child in children if child.stdout is not None]
        assert all((path / "model").exists() for path in paths)
        os.kill(children[0].pid, signal.SIGKILL)
        children[0].wait()
        MemoryFolder(str(SHM), home, "w").sweep()
        assert [path.exists() for path in paths] == [False, True]
        own = MemoryFolder(str(SHM), home, "w")
        own.path()
        own.close()
        assert (paths[1] / "model").exists()
        children[1].kill()
        children[1].wait()
        MemoryFolder(str(SHM), home, "w").sweep()
        assert not paths[1].parent.exists()
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


CROWD = """
import pathlib, sys
from tether.process.tmpfs_folder import MemoryFolder
for _ in range(150):
    folder = MemoryFolder("/dev/shm", pathlib.Path(sys.argv[1]), "w")
    path = folder.path()
    (path / "model").write_bytes(b"secret")
    assert (path / "model").read_bytes() == b"secret"
    folder.close()
"""


def test_processes_that_come_and_go_take_nothing_from_each_other_and_leave_nothing(home: Path) -> None:
    crowd = [subprocess.Popen([sys.executable, "-c", CROWD, str(home)], stderr=subprocess.PIPE) for _ in range(4)]
    try:
        ends = [child.communicate(timeout=60)[1] for child in crowd]
    finally:
        for child in crowd:
            child.kill()
            child.wait()
    assert [child.returncode for child in crowd] == [0] * 4, ends
    assert not MemoryFolder(str(SHM), home, "w")._own.exists()
