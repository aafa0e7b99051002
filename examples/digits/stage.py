"""What the demo stands on: a platform of its own, the ``tether`` command, and how it prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tether.process.os_process import alive, die_with_parent, send

BRIGHTEST = 16.0
WIDTH = 13
"""Columns that each part of the story's first word takes."""

Images = npt.NDArray[np.float32]


class DemoFailed(Exception):
    """Something that the demo promises did not hold."""


def check(held: bool, otherwise: str) -> None:
    if not held:
        raise DemoFailed(otherwise)


@contextlib.asynccontextmanager
async def within(seconds: float, otherwise: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DemoFailed(f"{otherwise} within {seconds:g} s") from error


# what it prints


def emphasised(text: str, code: str = "1") -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def tell(text: str, word: str = "") -> None:
    print(f"  {emphasised(word.ljust(WIDTH))}{text}", flush=True)


def step(word: str, command: str) -> None:
    print()
    tell(emphasised(command, "36"), word)


def shades() -> str:
    """From dark to bright, in what the terminal can show."""
    try:
        " ░▒▓█".encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return " .+#@"
    return " ░▒▓█"


def drawn(image: Images) -> list[str]:
    """The eight lines of an 8x8 image; a pixel is two columns wide, as high as it is wide."""
    scale = shades()
    levels = np.rint(image.reshape(8, 8) / BRIGHTEST * (len(scale) - 1)).astype(int)
    return ["".join(scale[level] * 2 for level in row) for row in levels]


def draw(images: Sequence[Images], captions: Sequence[str]) -> None:
    """Digits side by side, each over its caption."""
    for line in zip(*(drawn(image) for image in images), strict=True):
        tell("  ".join(line))
    tell("  ".join(caption.center(16) for caption in captions))


# the platform


def environment(home: Path) -> dict[str, str]:
    """This process's without anything that would lead elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TETHER_")}
    return {**kept, "TETHER_HOME": str(home), "TETHER_CONFIG_DIR": str(home)}


@dataclass
class Platform:
    """What ``tether up`` runs on ``home``, and the ``tether`` command beside it."""

    home: Path
    url: str = ""

    async def start_command(self, *words: str, **streams: Any) -> Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tether_cli", *words),
            cwd=self.home,
            env=environment(self.home),
            start_new_session=True,  # a Ctrl-C is for the demo, which then stops this one
            preexec_fn=die_with_parent(signal.SIGTERM),
            **streams,
        )

    async def tether(self, *words: str, stdin: str = "", statuses: Sequence[int] = (0,), watch: bool = False) -> str:
        """Run a command to its end and return what it printed; ``watch`` shows its progress bar."""
        errors = None if watch and sys.stderr.isatty() else PIPE
        process = await self.start_command(*words, stdin=PIPE, stdout=PIPE, stderr=errors)
        try:
            output, words_for_us = await process.communicate(stdin.encode())
        except BaseException:
            send(process.pid, signal.SIGKILL)
            raise
        why = (words_for_us or b"").decode().strip()
        check(process.returncode in statuses, f"'tether {' '.join(words)}' ended with {process.returncode}: {why}")
        return output.decode()

    async def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(await self.tether("status", "--json", statuses=(0, 1)))
        return content

    async def process(self, name: str) -> dict[str, Any]:
        """What ``tether status`` says of one process."""
        rows: list[dict[str, Any]] = (await self.status())["processes"]
        return next(row for row in rows if row["name"] == name)

    def last_words(self) -> str:
        lines = []
        for path in sorted((self.home / "logs").glob("*.log")):
            lines += [f"    {path.stem}: {line[:300]}" for line in path.read_text(errors="replace").splitlines()[-2:]]
        return "\n".join(lines)


@contextlib.asynccontextmanager
async def platform(home: Path, workers: int) -> AsyncIterator[Platform]:
    """Start everything, and stop everything however the block ends."""
    running = Platform(home)
    pids: list[int] = []
    (home / "logs").mkdir()
    with (home / "logs" / "up.log").open("wb") as log:
        words = ("up", "--http", "127.0.0.1:0", "--workers", str(workers), "--log-files")
        supervisor = await running.start_command(*words, stdin=DEVNULL, stdout=PIPE, stderr=log)
    try:
        assert supervisor.stdout is not None  # noqa: S101 - it was asked for
        line = (await supervisor.stdout.readline()).decode().split()
        check(line[:1] == ["ready"], "the platform did not start")
        running.url = line[1]
        yield running
        status = await running.status()
        pids = [status["supervisor"], *(row["pid"] for row in status["processes"])]
    except Exception:
        print(f"\n{running.last_words()}", file=sys.stderr)
        raise
    finally:
        await stop(running, supervisor)
    left = [pid for pid in pids if alive(pid)]
    check(not left, f"processes were left behind: {left}")


async def stop(running: Platform, supervisor: Process) -> None:
    """SIGTERM; what has not ended after that is killed, its children with it."""
    send(supervisor.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(30):
            await supervisor.wait()
    except BaseException:
        send(supervisor.pid, signal.SIGKILL)
        await supervisor.wait()
        await running.tether("down", statuses=(0, 1))
        raise
