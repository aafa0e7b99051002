"""Tests that confinement works on this machine, in a process confined like a model's.

``tether.sandbox.trial FILE PARENT`` runs in such a process, with a file that it may not read and a process
that it may not touch. It prints one JSON object: what it tried and what was refused.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from tether.process.os_process import keep_memory_private
from tether.sandbox import plan

_TIMEOUT_S = 30.0


class Result(msgspec.Struct, frozen=True):
    """``allowed`` lists what should have been refused and was not; ``scratch``: it has a private folder."""

    allowed: tuple[str, ...]
    scratch: bool


def tried(mode: str, scratch_mb: int) -> Result:
    """Start a confined process and let it try. Blocks.

    Raises:
        OSError: it could not be started, or did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="tether-trial-") as folder:
        secret = Path(folder) / "secret"
        secret.write_bytes(b"secret")
        wish = plan.ConfinementRequest(mode=mode, apart=folder, scratch_mb=scratch_mb)
        command = plan.command(plan.plan(wish), "tether.sandbox.trial", str(secret), str(os.getpid()))
        try:
            done = subprocess.run(
                command, env=plan.environment(), capture_output=True, timeout=_TIMEOUT_S, check=True, cwd="/"
            )
            return msgspec.json.decode(done.stdout, type=Result)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.decode(errors="replace").strip().splitlines() or [f"status {error.returncode}"])[-1]
            raise OSError(f"the confined process failed: {last}") from error
        except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            raise OSError("the confined process did not answer") from error


def main(secret: str, parent: str) -> None:
    keep_memory_private()
    attempts: dict[str, Callable[[], object]] = {
        "read files of others": lambda: Path(secret).read_bytes(),
        "write files of others": lambda: Path(secret).write_bytes(b""),
        "change the modes of files": lambda: Path(secret).chmod(0o777),
        "read another process's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "signal other processes": lambda: os.kill(int(parent), 0),
        "use the network": lambda: socket.socket().close(),
        "start processes": _start,
    }
    allowed = tuple(name for name, attempt in attempts.items() if not _refused(attempt))
    found = Result(allowed, bool(os.environ.get("TMPDIR")))
    sys.stdout.buffer.write(msgspec.json.encode(found))


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:  # a file that is not even visible counts as refused
        return True
    return False


def _start() -> None:
    subprocess.run([sys.executable, "-c", ""], check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
