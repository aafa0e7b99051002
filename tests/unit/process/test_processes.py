"""What a process tells the C library and the kernel about itself."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, sys, threading
from tether.process import os_process as processes
if sys.argv[1] == "few":
    processes.limit_malloc_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(8)
def use():
    together.wait()  # all of them live at a time
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=use) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has heaps for threads")
def test_threads_share_the_heaps_of_a_service() -> None:
    def heaps(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HEAPS, how], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.count("<heap nr=")

    assert heaps("few") <= 2 < heaps("as it is")
