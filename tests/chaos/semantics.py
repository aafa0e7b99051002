"""Cancellation, deadlines, poison, crashes, batches and idempotency keys: what the HTTP documentation promises."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from chaos.history import listed_jobs
from chaos.jobs import Job, Jobs, code
from chaos.platform import Platform, lives
from chaos.report import arguments, check, counted, fail, finish, listed, say, stamp
from chaos.workload import body, right, row, square

LONG_S = 6.0
_RESULT_TTL_S = 60

CRASHING = """
import os, time


class Model:
    def predict(self, inputs):
        x = inputs["x"]
        if (x[:, 0] == 666).any():
            os._exit(9)
        time.sleep(0.02)
        return {"y": x * x}
"""
_AXES = {"datatype": "FP32", "shape": [-1, 4]}
DESCRIPTION = {
    "className": "Model",
    "inputs": [{"name": "x", **_AXES}],
    "outputs": [{"name": "y", **_AXES}],
    "maxBatchSize": 16,
}


def cancel(jobs: Jobs) -> None:
    running = jobs.accepted(1, LONG_S)
    time.sleep(1)
    before = jobs.get(running)["state"]
    answer = jobs.cancel(running)
    say("cancel a running job:", before, answer.status_code, answer.json().get("state"))
    began = time.monotonic()
    behind = jobs.until_ended(jobs.accepted(2), 20)
    waited = time.monotonic() - began
    check(
        behind["state"] == "succeeded" and waited < 1.5,
        f"the job behind a cancelled one: {behind['state']} after {waited:.1f} s",
    )
    time.sleep(LONG_S + 2)
    after = jobs.get(running)["state"]
    check(after == "cancelled", f"a cancelled job became {after}")
    jobs.stop_workers()
    queued = jobs.accepted(3, LONG_S)
    jobs.cancel(queued).raise_for_status()
    jobs.let_workers_run()
    time.sleep(1)
    check(jobs.busiest_worker() < 50, "a job that was cancelled while it was queued is run all the same")
    again = jobs.cancel(queued)
    check(again.status_code == 409, f"cancelled twice: {again.status_code} {again.text[:100]}")
    ended = jobs.accepted(4)
    jobs.until_ended(ended)
    again = jobs.cancel(ended)
    check(again.status_code == 409, f"cancelled after its end: {again.status_code} {again.text[:100]}")


def deadline(jobs: Jobs) -> None:
    jobs.stop_workers()
    queued = jobs.accepted(5, LONG_S, deadline_ms=500)
    time.sleep(3)
    state = jobs.get(queued)["state"]
    check(state == "expired", f"a job whose deadline passed in the queue is {state}")
    jobs.let_workers_run()
    time.sleep(1)
    check(jobs.busiest_worker() < 50, "an expired job is run")
    ends = {looked: late_job(jobs, looked=looked) for looked in (True, False)}
    say("deadline 2 s, run 6 s: looked at", ends[True], "not looked at", ends[False])
    check(ends[True][0] == ends[False][0] == "expired", f"a job that ends after its deadline: {ends}")
    jobs.stop_workers()
    began = time.monotonic()
    asked = {**body(7), "parameters": {"timeout": 1_500_000}}
    answer = jobs.platform.http.post("/v2/models/sq/infer", json=asked)
    waited = time.monotonic() - began
    jobs.let_workers_run()
    check(
        answer.status_code == 504 and waited < 3,
        f"a caller with a timeout of 1.5 s: {answer.status_code} after {waited:.1f} s",
    )
    time.sleep(1)


def late_job(jobs: Jobs, *, looked: bool) -> tuple[str, float]:
    """A job that runs for longer than its deadline allows; its state, and how long after its submission it ended."""
    job = jobs.accepted(6, LONG_S, deadline_ms=2000)
    for _ in range(15):
        time.sleep(0.6)
        if looked:
            jobs.get(job)
    found = jobs.until_ended(job, 20)
    return found["state"], round(stamp(found["finished_at"]) - stamp(found["submitted_at"]), 2)


def poison(jobs: Jobs) -> None:
    """Whoever runs one job is killed; 40 others travel in the same bundle."""
    batch: list[Job] = [{"model": "sq", **body(number, jobs.turns(0.05))} for number in range(40)]
    batch.insert(5, {"model": "sq", **body(999, jobs.turns(3 * LONG_S))})
    ids = [job["id"] for job in jobs.batch(batch).raise_for_status().json()["jobs"]]
    guilty = ids.pop(5)
    workers, began, seen = jobs.platform.worker_names, time.monotonic(), 0
    time.sleep(1.5)
    jobs.platform.kill(*workers)
    while time.monotonic() - began < 150:
        found = jobs.get(guilty)
        if found["state"] not in ("queued", "running"):
            break
        if found["state"] == "running" and found["attempts"] != seen:
            seen = found["attempts"]
            time.sleep(0.8)
            jobs.platform.kill(*workers)
        time.sleep(0.1)
    neighbours = [jobs.until_ended(job) for job in ids]
    states = counted(job["state"] for job in neighbours)
    say(f"poison: {found['state']} {code(found)} after {found.get('attempts')} attempts; neighbours {states}")
    check(found["state"] == "dead" and states == {"succeeded": 40}, f"poison: {found['state']}, neighbours {states}")
    wrong = sum(not right(job["result"]["outputs"], number) for number, job in enumerate(neighbours) if "result" in job)
    check(not wrong, f"poison: {wrong} neighbours have wrong answers")


def crash(jobs: Jobs) -> None:
    """A model in a process of its own that ends itself: what that costs others, and what is left of it."""
    platform = jobs.platform
    folder = platform.home / "crashing"
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text(json.dumps(DESCRIPTION))
    (folder / "model.py").write_text(CRASHING)
    say("push:", platform.cli("model", "push", "crash", str(folder)).strip()[-150:])
    platform.ready("crash")

    def ask(number: int) -> int:
        asked = row(666 if number == 50 else number % 600, 0, 7, 0)
        return platform.http.post("/v2/models/crash/infer", json=asked).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(ask, range(100)))
    innocent = counted(status for number, status in enumerate(statuses) if number != 50)
    check(innocent == {200: 99}, f"callers beside one that crashes the model: {innocent}")
    batch = [{"model": "crash", **row(666 if number == 20 else number, 0, 7, 0)} for number in range(60)]
    ids = [job["id"] for job in jobs.batch(batch).raise_for_status().json()["jobs"]]
    ends = [jobs.until_ended(job)["state"] for job in ids]
    guilty = ends.pop(20)
    say("durable jobs: the guilty one", guilty, "neighbours", counted(ends))
    check(counted(ends) == {"succeeded": 59}, f"jobs beside one that crashes the model: {counted(ends)}")
    children = [
        child.pid
        for name in platform.worker_names
        for child in psutil.Process(platform.pids()[name]).children(recursive=True)
    ]
    platform.kill(*platform.worker_names)
    time.sleep(2)
    left = [pid for pid in children if lives(pid)]
    check(not left, f"{len(left)} of {len(children)} model processes outlive their killed worker")


def batch(jobs: Jobs) -> None:
    whole: list[Job] = [{"model": "sq", **body(number)} for number in range(1000)]
    ids = [job["id"] for job in jobs.batch(whole, "B1").raise_for_status().json()["jobs"]]
    for start in range(0, 1000, 200):
        query: dict[str, str | int] = {"ids": ",".join(ids[start : start + 200]), "wait": 20}
        for number, job in enumerate(jobs.platform.http.get("/v1/jobs", params=query).json()["jobs"], start):
            if job["state"] != "succeeded" or not right(job["result"]["outputs"], number):
                fail(f"job {number} of a batch: {job['state']}, or a wrong answer")
    again = jobs.batch(whole, "B1").json()
    check([job["id"] for job in again.get("jobs", [])] == ids, f"a batch sent again under its key: {str(again)[:150]}")
    other = jobs.batch([{"model": "sq", **body(number + 1)} for number in range(1000)], "B1")
    check(other.status_code == 409, f"another batch under a used key: {other.status_code}")
    before = set(listed_jobs(jobs.platform))
    refused = jobs.batch([*whole[:500], {"model": "nope", **body(1)}])
    time.sleep(1)
    added = set(listed_jobs(jobs.platform)) - before
    check(refused.status_code == 404 and not added, f"a batch with one bad job: {refused.status_code}, {added} queued")
    large = jobs.batch([*whole, whole[0]])
    check(large.status_code == 413, f"a batch of 1001 jobs: {large.status_code}")


def idem(jobs: Jobs) -> None:
    """One idempotency key, used by many at once."""
    platform = jobs.platform
    with ThreadPoolExecutor(24) as pool:
        for number in range(5):
            answers = list(pool.map(lambda _, n=number: jobs.submit(n, key=f"same-{n}"), range(24)))
            ids = {answer.json().get("id") for answer in answers}
            statuses = counted(answer.status_code for answer in answers)
            check(statuses == {202: 24} and len(ids) == 1, f"24 at once under one key: {statuses}, {len(ids)} jobs")
        answers = list(pool.map(lambda number: jobs.submit(number, key="race"), range(24)))
    won = [number for number, answer in enumerate(answers) if answer.status_code == 202]
    check(len(won) == 1, f"24 other bodies under one key at once: {counted(one.status_code for one in answers)}")
    job = answers[won[0]].json()["id"]
    check(right(jobs.until_ended(job)["result"]["outputs"], won[0]), "the winner of a race has another's answer")
    platform.cli("tenant", "create", "other")
    key = json.loads(platform.cli("key", "create", "--tenant", "other", "--scope", "jobs", "--json"))["key"]
    headers = {"x-api-key": key, "Idempotency-Key": "race"}
    theirs = httpx.post(platform.url + "/v1/jobs", json={"model": "sq", **body(77)}, headers=headers)
    check(theirs.json().get("id") != job, "two tenants share a job by an idempotency key")
    status = httpx.get(platform.url + f"/v1/jobs/{job}", headers={"x-api-key": key}).status_code
    check(status == 404, f"another tenant's job is answered with {status}")


class UsedAgain:
    """Keys that are used again after the job of their first use was forgotten."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._began = time.monotonic()
        first = [jobs.accepted(100 + number, key=f"nightly-{number}", deadline_ms=1000) for number in range(5)]
        say("keys used for the first time:", {jobs.get(job, 5)["state"] for job in first})

    def again(self) -> None:
        jobs = self._jobs
        time.sleep(max(0.0, self._began + _RESULT_TTL_S + 6 - time.monotonic()))
        for number in range(5):
            answer = jobs.submit(200 + number, key=f"nightly-{number}", deadline_ms=5000)
            if answer.status_code == 409:
                continue  # it is remembered still
            found = jobs.until_ended(answer.raise_for_status().json()["id"], 12)
            own = found["state"] == "succeeded" and right(found["result"]["outputs"], 200 + number)
            check(
                own,
                f"a key used again after its job was forgotten: {found['state']}, or the answer to the first inputs",
            )


PARTS = {"cancel": cancel, "deadline": deadline, "poison": poison, "crash": crash, "batch": batch, "idem": idem}


def main() -> None:
    given = arguments(__doc__, parts=",".join(("ttl", *PARTS)))
    parts = listed(given.parts)
    home = Path(given.folder) / f"semantics-{given.seed}"
    with Platform(home, given.port, result_ttl_s=_RESULT_TTL_S) as platform:
        platform.push("sq", square())
        jobs = Jobs(platform)
        used = UsedAgain(jobs) if "ttl" in parts else None
        for part in parts:
            if part in PARTS:
                say(f"-- {part}")
                PARTS[part](jobs)
        if used is not None:
            used.again()
        say("restarts", platform.endpoints["restarts"])
    finish()


if __name__ == "__main__":
    main()
