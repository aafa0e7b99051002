"""File systems of a test's own: small ones, that fill."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tether.process.data_dir import private_folder

UMOUNT = shutil.which("umount") or "umount"


@contextmanager
def small_disk(folder: Path, mb: int, options: str = "") -> Iterator[None]:
    """A file system of its own for ``folder``; ``options``: more of tmpfs's, such as ``nr_inodes=64``."""
    private_folder(folder)
    given = f"size={mb}m,mode=0700" + (f",{options}" if options else "")
    command = ["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run([UMOUNT, "-l", str(folder)], check=True)


def fill(path: Path, leave_mb: float = 0.0) -> None:
    """Write a file until its file system has ``leave_mb`` megabytes free."""
    with path.open("wb", buffering=0) as file:
        while (free := os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize - leave_mb * (1 << 20)) > 0:
            try:
                file.write(bytes(int(min(free, 1 << 20))))
            except OSError:
                return
