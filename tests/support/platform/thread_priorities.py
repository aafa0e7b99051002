"""How far threads go after others, by the kernel."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def nice_of_threads(pid: int | str = "self") -> list[int]:
    """Of the threads of a process."""
    found = []
    with suppress(FileNotFoundError):  # it has ended
        for path in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended since
                found.append(os.getpriority(os.PRIO_PROCESS, int(path.name)))
    return found
