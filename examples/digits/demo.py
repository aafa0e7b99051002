"""A whole platform, a model, a killed worker, and no lost job: what ``make demo`` runs.

Everything happens in a folder of its own on free ports; nothing of it is left, whatever happens. Exit status 0 only when
all that the demo says is true.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from stage import DemoFailed, Images, Platform, check, draw, emphasised, platform, step, tell, within

from tether import AsyncClient
from tether.errors import TetherError

HERE = Path(__file__).resolve().parent
MODEL = "digits"
JOBS = 2000
CALLERS = 16
WORKERS = 2
VICTIM = "worker-1"
ACCURACY = 0.95
LIMIT_S = 60.0
STOP_S = 10.0
"""What of the limit is kept for stopping everything."""

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What the model said of each image, and how long each answer took, in seconds."""

    labels: Labels
    probabilities: npt.NDArray[np.float32]
    seconds: npt.NDArray[np.float64]
    per_s: float


async def ask(client: AsyncClient, images: Images) -> Answers:
    """One request an image, ``CALLERS`` at a time."""
    labels = np.zeros(len(images), np.int64)
    probabilities = np.zeros((len(images), 10), np.float32)
    seconds = np.zeros(len(images))
    numbers = iter(range(len(images)))

    async def caller() -> None:
        for number in numbers:
            begun = time.perf_counter()
            outputs = await client.infer(MODEL, {"image": images[number : number + 1]})
            seconds[number] = time.perf_counter() - begun
            labels[number], probabilities[number] = outputs["label"][0], outputs["probabilities"][0]

    await asyncio.gather(*(client.infer(MODEL, {"image": images[:1]}) for _ in range(CALLERS)))  # opens connections
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
    return Answers(labels, probabilities, seconds, len(images) / (time.perf_counter() - begun))


def show_answers(images: Images, labels: Labels, answers: Answers) -> None:
    right = int((answers.labels == labels).sum())
    accuracy = right / len(labels)
    check(accuracy >= ACCURACY, f"accuracy is {accuracy:.3f}, below {ACCURACY}")
    p50, p99 = np.percentile(answers.seconds, (50, 99)) * 1000
    tell(f"{right} of {len(labels)} right: accuracy {accuracy:.1%}")
    tell(f"{answers.per_s:,.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, from one Python client")
    print()
    hits, misses = np.flatnonzero(answers.labels == labels), np.flatnonzero(answers.labels != labels)
    chosen = [*hits[:4], *misses[:1]]
    draw([images[number] for number in chosen], [caption(answers, labels, number) for number in chosen])


def caption(answers: Answers, labels: Labels, number: int) -> str:
    label = int(answers.labels[number])
    wrong = "" if label == labels[number] else f", is {labels[number]}"
    return f"{label} ({answers.probabilities[number][label]:.1%}){wrong}"


async def until_ended(http: httpx.AsyncClient, ports: Sequence[int], wanted: int) -> int:
    """Wait until the workers on these ports have ended ``wanted`` jobs, by their own count; how many they have."""
    while True:
        texts = [(await http.get(f"http://127.0.0.1:{port}/metrics")).text for port in ports]
        counts = re.findall(r"^tether_jobs_finished_total\{.*\} (\S+)$", "\n".join(texts), re.MULTILINE)
        if (ended := int(sum(map(float, counts)))) >= wanted:
            return ended
        await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Killed:
    """A worker's death: its process, when it was (seconds since 1970), how many jobs had ended, and all the jobs."""

    pid: int
    at: float
    ended: int
    ids: list[str]


async def submit_and_kill(running: Platform, name: str) -> Killed:
    """Submit every image of a file as a job of its own; SIGKILL a worker when half of the jobs have ended.

    It is frozen at its first answers: what it takes after that is in its hands when it dies.
    """
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http, asyncio.TaskGroup() as group:
        rows = (await running.status())["processes"]
        pid = next(row["pid"] for row in rows if row["name"] == VICTIM)
        ports = {row["name"]: row["port"] for row in rows if row["name"].startswith("worker-")}
        before = {worker: await until_ended(http, [port], 0) for worker, port in ports.items()}
        submitting = group.create_task(running.tether("submit", MODEL, name, "--rows", "--json", watch=True))
        mine = await until_ended(http, [ports.pop(VICTIM)], before[VICTIM] + 1)
        os.kill(pid, signal.SIGSTOP)
        ended = mine + await until_ended(http, list(ports.values()), sum(before.values()) + JOBS // 2 - mine)
        os.kill(pid, signal.SIGKILL)
        at = time.time()
    return Killed(pid, at, ended - sum(before.values()), json.loads(submitting.result())["jobs"])


def moment(job: dict[str, Any], name: str) -> float:
    """A time of a job in seconds since 1970."""
    return datetime.fromisoformat(job[name]).timestamp()


def label_of(job: dict[str, Any]) -> int:
    outputs = job["result"]["outputs"]
    return int(next(output["data"][0] for output in outputs if output["name"] == "label"))


def show_jobs(jobs: Sequence[dict[str, Any]], killed: Killed, expected: Labels) -> None:
    """Each ended exactly once, as the model says it must."""
    distinct = len({job["id"] for job in jobs})
    states = Counter(job["state"] for job in jobs)
    check(distinct == JOBS, f"{distinct} jobs were accepted, not {JOBS}")
    check(states == {"succeeded": JOBS}, f"jobs ended as {dict(states)}, not {JOBS} succeeded")
    tell(f"{JOBS:,} of {JOBS:,} jobs succeeded, none lost")
    wrong = sum(label_of(job) != label for job, label in zip(jobs, expected, strict=True))
    check(wrong == 0, f"{wrong} jobs answered otherwise than the same image over HTTP")
    tell(f"{JOBS:,} answers are those that the same images got over HTTP")
    show_speed([job for job in jobs if job["attempts"] <= 1], [job for job in jobs if job["attempts"] > 1], killed)


def show_speed(first: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]], killed: Killed) -> None:
    """How fast the jobs were that met no dead worker, and when the others ended."""
    took = max(moment(job, "finished_at") for job in first) - min(moment(job, "submitted_at") for job in first)
    tell(f"{len(first) / took:,.0f} jobs/s, submitted to ended, for the {len(first):,} that never met the dead worker")
    if again:
        late = max(moment(job, "finished_at") for job in again) - killed.at
        tell(f"{len(again):,} were in its hands: given to another worker, ended {late:.1f} s after the kill")


async def show_streams(running: Platform) -> None:
    """One stored result a job, nothing left in the queue, nothing dead: the broker's own count.

    For a second now and then there is one message more: services store and read back an empty one to know that they can.
    """
    wanted = {"TETHER_RESULTS": JOBS, "TETHER_JOBS_0": 0, "TETHER_DEAD": 0}
    counts: dict[str, int] = {}
    try:
        async with asyncio.timeout(15):
            while counts != wanted:
                streams = (await running.status())["broker"]["streams"]
                counts = {row["name"]: row["messages"] for row in streams if row["name"] in wanted}
    except TimeoutError as error:
        raise DemoFailed(f"the broker has {counts}, not {wanted}, 15 s after the last job") from error
    tell(f"{JOBS:,} results stored, no job still queued, no dead letter: the broker's own count")


async def show_restart(running: Platform, old_pid: int) -> None:
    async with within(20, f"{VICTIM} was not back"):
        while not ((found := await running.process(VICTIM))["ready"] and found["pid"] != old_pid):
            await asyncio.sleep(0.2)
    tell(f"{VICTIM} is back as process {found['pid']}: the supervisor restarted it")


async def story(running: Platform) -> None:
    with np.load(HERE / "digits_holdout.npz", allow_pickle=False) as holdout:
        images, labels = holdout["images"], holdout["labels"]

    step("push", f"tether model push {MODEL} digits.onnx")
    pushed = json.loads(await running.tether("model", "push", MODEL, str(HERE / "digits.onnx"), "--json"))
    tell(f"{pushed['name']} version {pushed['version']}: {pushed['size']:,} bytes, checked, warmed up and signed")

    step("ask", f"{len(images)} held-out images, one HTTP request each, {CALLERS} at a time")
    key = (running.home / "admin.key").read_text().strip()
    async with AsyncClient(running.url, key) as client:
        answers = await ask(client, images)
    show_answers(images, labels, answers)

    np.savez(running.home / "images.npz", image=np.resize(images, (JOBS, images.shape[1])))
    step("submit", f"tether submit {MODEL} images.npz --rows")
    killed = await submit_and_kill(running, "images.npz")
    tell(f"{len(killed.ids):,} durable jobs, an image each")

    step("kill", f"kill -KILL {killed.pid}")
    tell(f"that was {VICTIM}, when {killed.ended:,} of {JOBS:,} jobs had ended")
    tell("what it had in its hands comes back after 10 s without a sign of it: one moment ...")
    output = await running.tether(
        "job", "wait", "-", "--within", "40", "--json", stdin=" ".join(killed.ids), watch=True
    )
    show_jobs(json.loads(output)["jobs"], killed, np.resize(answers.labels, JOBS))
    await show_streams(running)
    await show_restart(running, killed.pid)
    step("stop", "tether down")


async def demo() -> None:
    """The whole demo within its time limit.

    Raises:
        DemoFailed: something did not hold.
    """
    begun = time.monotonic()
    async with within(LIMIT_S, "the demo did not end"):
        with tempfile.TemporaryDirectory(prefix="tether-demo-") as folder:
            step("start", f"tether up --workers {WORKERS}")
            async with platform(Path(folder), WORKERS) as running:
                tell(f"broker, model store, dispatcher, workers, gateway: ready in {time.monotonic() - begun:.1f} s")
                async with within(LIMIT_S - STOP_S, "the demo did not end"):
                    await story(running)
            tell("every process has ended")
    print(f"\n  {emphasised('All of it held', '1;32')}, in {time.monotonic() - begun:.1f} s.\n")


async def run() -> None:
    """The demo, which SIGTERM and SIGHUP end as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - this is one
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await demo()


def main() -> int:
    try:
        asyncio.run(run())
    except (DemoFailed, TetherError, BaseExceptionGroup) as error:
        print(f"\n  {emphasised('FAILED', '1;31')}: {reason(error)}\n", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\n  stopped; nothing was left behind\n", file=sys.stderr)
        return 130
    return 0


def reason(error: BaseException) -> str:
    """The first error of a group, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
