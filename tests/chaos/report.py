"""What a script says, finds and ends with: ``clean``, or its failures and exit status 1."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

SKIPPED = 77
"""Exit status of a script that this machine cannot run."""

failures: list[str] = []


def say(*words: object) -> None:
    print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


def fail(message: str) -> None:
    """A promise was broken. The script goes on: what follows may tell why."""
    failures.append(message)
    say("FAIL", message)


def check(true: object, message: str) -> None:
    if not true:
        fail(message)


def finish() -> NoReturn:
    """The last line, and the exit status."""
    if failures:
        print(f"{len(failures)} failures: " + " | ".join(failure[:200] for failure in failures[:12]), flush=True)
    else:
        print("clean", flush=True)
    sys.exit(1 if failures else 0)


def skip(reason: str) -> NoReturn:
    print(f"skipped: {reason}", flush=True)
    sys.exit(SKIPPED)


def need(*programs: str, root: bool = False) -> None:
    """Skip the script where a program is missing, or where it would have to be root."""
    if root and os.geteuid() != 0:
        skip("needs root, to mount file systems")
    for program in programs:
        if shutil.which(program) is None:
            skip(f"needs the program '{program}'")


def run(*words: str, ok: bool = True) -> int:
    """Run a program to its end; its exit status. With ``ok`` it must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if ok and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-300:]}")
    return done.returncode


def arguments(text: str | None, **defaults: float | str) -> argparse.Namespace:
    """The script's arguments; each has the type of its default. ``text`` is the script's docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seed": 1, "port": 8300, "folder": str(folder()), **defaults}.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    given = parser.parse_args()
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    return given


def folder() -> Path:
    """Where the homes of all scripts are, unless an argument says otherwise."""
    return Path(tempfile.gettempdir()) / "tether-chaos"


def listed(text: str) -> list[str]:
    """The parts of a comma-separated argument."""
    return [part for part in text.split(",") if part]


def stamp(text: str) -> float:
    """A time of the API, as seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def percentile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def spread(values: Sequence[float]) -> str:
    """Least, median, ninth decile and most."""
    if not values:
        return "n=0"
    middle, high = percentile(values, 0.5), percentile(values, 0.9)
    return f"n={len(values)} min {min(values):.2f} p50 {middle:.2f} p90 {high:.2f} max {max(values):.2f}"


def counted(values: Iterable[object]) -> dict[object, int]:
    return dict(Counter(values))
