"""Prints the ready message of ``tether up``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tether.process.data_dir import Home


def greet(home: Home, url: str) -> None:
    """Print that the platform is ready: one line for programs, next steps for a person at a terminal."""
    print(f"ready {url}", flush=True)
    if not sys.stdout.isatty():
        return
    where = "" if home.root == Path(".tether").absolute() else f" --data-dir {shlex.quote(str(home.root))}"
    print(
        f"""
  API key   in {home.admin_key}; commands on this machine find it there
  next      tether model push NAME FILE
            tether infer NAME INPUT
            tether status{where}
  stop      Ctrl-C, or: tether down{where}
""",
        flush=True,
    )
