"""Attacks platforms of real processes, one script after another, and says which promises were broken.

    make chaos                                            # all of them: about an hour on two cores
    make chaos CHAOS="kills semantics" SEED=7
    PYTHONPATH=tests python -m chaos.kills --seed 7 --worker-kills 5 --other-kills 10 --pauses 2

Each script tells its arguments with ``--help``, prints what it measures, and ends with ``clean`` or with its failures and exit
status 1. Homes are below a temporary folder; only loopback is used; only processes of those homes are signalled.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from chaos.report import SKIPPED, folder

SCRIPTS: dict[str, tuple[int, list[str]]] = {
    "semantics": (6, []),
    "priorities": (4, []),
    "behind": (4, []),
    "retention": (10, []),
    "supervisor": (8, []),
    "powerloss": (8, ["--durability", "durable"]),
    "powerloss-fast": (8, ["--durability", "fast"]),
    "diskfull": (10, []),
    "cluster": (8, []),
    "multi": (8, []),
    "clock": (8, []),
    "kills": (20, ["--worker-kills", "8", "--other-kills", "20"]),
    "tenants": (5, ["--seconds", "60"]),
    "soak": (12, ["--seconds", "300"]),
    "scale": (20, ["--models", "300", "--jobs", "10000"]),
    "bigbroker": (20, ["--models", "300"]),
}
"""By name: the minutes that a script may take, and its arguments here."""


def run(name: str, given: argparse.Namespace) -> tuple[str, float]:
    """How a script ended, and how long it took."""
    minutes, words = SCRIPTS[name]
    module = f"chaos.{name.partition('-')[0]}"
    line = [sys.executable, "-m", module, "--seed", str(given.seed), "--port", str(given.port), *words]
    began = time.monotonic()
    process = subprocess.Popen([*line, "--folder", given.folder], start_new_session=True)
    try:
        status = process.wait(minutes * 60)
        ended = {0: "clean", SKIPPED: "skipped"}.get(status, f"FAILED ({status})")
    except subprocess.TimeoutExpired:
        ended = f"FAILED (not done in {minutes} minutes)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            left = [sys.executable, "-m", "chaos.left", "--folder", given.folder, "--end", "1"]
            subprocess.run(left, check=False)
    return ended, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help=f"default: all of {' '.join(SCRIPTS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=8300, help="the first of ten ports in a row")
    parser.add_argument("--folder", default=str(folder()), help="where the homes are")
    given = parser.parse_args()
    unknown = [name for name in given.scripts if name not in SCRIPTS]
    if unknown:
        parser.error(f"no such script: {' '.join(unknown)}")
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    ends = {}
    for name in given.scripts or SCRIPTS:
        print(f"== {name}", flush=True)
        ends[name] = run(name, given)
    print()
    for name, (ended, seconds) in ends.items():
        print(f"{name:16} {seconds:6.0f} s  {ended}")
    return int(any(ended.startswith("FAILED") for ended, _ in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
