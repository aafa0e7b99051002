"""Room on file systems: small ones, those without inodes, and those that may not be written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.platform.disks import UMOUNT, fill, small_disk

from tether.process.disk import FEWEST_INODES, MB, Room, look, refusal, reserve, shortage


@pytest.mark.parametrize(
    ("total_mb", "asked_mb", "kept_mb"),
    [(100_000, 512, 512), (1024, 512, 64), (90, 512, 16), (90, 8, 8), (90, 0, 0)],
)
def test_a_reserve_is_what_was_asked_for_and_never_most_of_a_small_disk(
    total_mb: int, asked_mb: int, kept_mb: int
) -> None:
    assert reserve(Room(0, total_mb * MB), asked_mb) == kept_mb * MB


def test_a_disk_is_short_below_its_reserve_and_has_room_again_only_above_it() -> None:
    room = Room(19 * MB, 300 * MB)
    assert shortage(room, 512) == ""
    assert shortage(room, 512, more=1.25) == "has 19 of 300 MB free, and 18 MB are kept in reserve"
    assert shortage(Room(MB, 300 * MB), 0) == ""


def test_inodes_and_read_only_file_systems_count_too() -> None:
    assert shortage(Room(100 * MB, 300 * MB, FEWEST_INODES - 1), 512) == f"has {FEWEST_INODES - 1} free inodes left"
    assert shortage(Room(100 * MB, 300 * MB, None), 512) == ""
    assert shortage(Room(100 * MB, 300 * MB, read_only=True), 512) == "is mounted read-only"


def test_a_folder_with_room_takes_files_and_keeps_none(tmp_path: Path) -> None:
    room = look(tmp_path)
    assert room is not None
    assert 0 < room.free <= room.total
    assert refusal(tmp_path) == ""
    assert not list(tmp_path.iterdir())
    assert look(tmp_path / "absent") is None
    assert refusal(tmp_path / "absent") == "no such file or directory"


def test_a_full_file_system_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 20):
        folder = tmp_path / "disk"
        fill(folder / "ballast")
        room = look(folder)
        assert room is not None
        assert shortage(room, 512) == "has 0 of 20 MB free, and 16 MB are kept in reserve"
        assert refusal(folder) == "no space left on device"


def test_a_file_system_without_inodes_says_so_although_it_has_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100, "nr_inodes=80"):
        folder = tmp_path / "disk"
        for number in range(70):
            (folder / str(number)).touch()
        room = look(folder)
        assert room is not None
        assert room.free > 90 * MB
        assert "free inodes left" in shortage(room, 512)
        for number in range(70, 90):
            try:
                (folder / str(number)).touch()
            except OSError:
                break
        assert refusal(folder) == "no space left on device"


def test_a_file_system_that_was_mounted_read_only_again_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100):
        folder = tmp_path / "disk"
        subprocess.run([UMOUNT.replace("umount", "mount"), "-o", "remount,ro", str(folder)], check=True)
        room = look(folder)
        assert room is not None
        assert shortage(room, 512) == "is mounted read-only"
        assert refusal(folder) == "read-only file system"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refusal(tmp_path) == "permission denied"
