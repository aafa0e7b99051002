"""Processes are killed under load: the audit log is whole, holds what was answered, and one changed byte is named."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.http.served import until
from support.platform.platforms import ROOT, Platform, platform

from tether.audit import read_records, write_record
from tether.crypto import body_of
from tether.process.os_process import send

DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
KILLS = ("gateway", "nats", "gateway", "nats", "modelstore")

pytestmark = pytest.mark.slow


def infer(http: httpx.Client, number: int, done: list[str]) -> None:
    """One request under an id of its own; the id is kept when it was answered."""
    body = {"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
    name = f"chaos-{number}"
    try:
        answer = http.post("/v2/models/digits/infer", json=body, headers={"x-request-id": name})
    except httpx.TransportError:
        return
    if answer.status_code == 200:
        done.append(name)


def load(running: Platform, stop: threading.Event, done: list[str], start: int) -> None:
    number = start
    while not stop.is_set():
        with httpx.Client(
            base_url=running.url, headers={"x-api-key": running.key}, timeout=20, trust_env=False
        ) as http:
            for _ in range(50):
                if stop.is_set():
                    break
                infer(http, number, done)
                number += 1


def found_in(running: Platform, *words: str) -> list[dict[str, Any]]:
    printed = running.run("audit", "search", "--json", "--limit", "100000", *words)
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def test_the_log_is_whole_after_processes_were_killed_and_names_what_is_changed(tmp_path: Path) -> None:
    with platform(workers=1) as running:
        pushed = running.run("model", "push", "digits", str(DIGITS))
        assert pushed.returncode == 0, pushed.stderr
        with httpx.Client(base_url=running.url, headers={"x-api-key": running.key}, trust_env=False) as http:
            until(lambda: http.get("/v2/models/digits/ready").status_code == 200, "the model is ready", 30)
        done: list[str] = []
        stop = threading.Event()
        threads = [threading.Thread(target=load, args=(running, stop, done, n * 1_000_000)) for n in range(2)]
        for thread in threads:
            thread.start()
        try:
            for victim in KILLS:
                reached = len(done) + 40
                until(lambda reached=reached: len(done) >= reached, f"40 answers before the death of {victim}", 40)
                send(running.pids[victim], signal.SIGKILL)
                until(running.ready, f"{victim} is back", 40)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        check_whole(running, done)
        check_damage(running, tmp_path / "audit.log")


def check_whole(running: Platform, done: list[str]) -> None:
    """Whole, and of what was answered only that is missing which a killed gateway had recorded in its last 0.2 s."""
    verified = running.run("audit", "verify", "--json")
    assert verified.returncode == 0, verified.stdout + running.logs()
    report = json.loads(verified.stdout)
    assert set(report["writers"]) == {"dispatcher", "gateway", "modelstore"}
    until(
        lambda: done[-1] in {row["request_id"] for row in found_in(running, "--kind", "inference")}, "the last answer"
    )
    known = [row["request_id"] for row in found_in(running, "--kind", "inference", "--outcome", "ok")]
    assert len(known) == len(set(known))
    lost = [name for name in done if name not in set(known)]
    rate = len(done) / max(1.0, (report["last_at"] - report["first_at"]) / 1000)
    assert len(lost) <= 2 * max(10.0, 4 * 0.2 * rate), f"{len(lost)} of {len(done)} are missing"
    last = running.run("audit", "tail", "-n", "3")
    assert len(last.stdout.splitlines()) == 3


def check_damage(running: Platform, path: Path) -> None:
    """An export of it is whole; with one byte of one entry changed, the entry is named."""
    assert running.run("audit", "export", str(path)).returncode == 0
    good = running.run("audit", "verify", "--from", str(path))
    assert good.returncode == 0, good.stdout
    assert "whole" in good.stderr
    with path.open("rb") as file:
        records = [record for record, _ in read_records(file)]
    at = max(index for index, record in enumerate(records) if record.subject.endswith(".inference"))
    frame = bytearray(records[at].frame)
    entry = frame.rindex(b"chaos-", len(frame) - len(body_of(bytes(frame))))
    frame[entry] ^= 1
    damaged = records[at].__class__(records[at].sequence, records[at].subject, 0, records[at].message_id, bytes(frame))
    path.write_bytes(b"".join(write_record(record) for record in [*records[:at], damaged, *records[at + 1 :]]))
    bad = running.run("audit", "verify", "--from", str(path))
    assert bad.returncode == 1
    assert f"message {damaged.sequence}, {damaged.subject}, gateway run" in bad.stdout
    assert "this entry was altered" in bad.stdout
    path.write_bytes(path.read_bytes()[:-7])
    cut = running.run("audit", "verify", "--from", str(path))
    assert cut.returncode == 1
    assert "middle of a block" in cut.stderr
    started = time.monotonic()
    kept = b"".join(write_record(record) for record in [*records[: at - 1], *records[at:]])
    path.write_bytes(kept)
    gone = running.run("audit", "verify", "--from", str(path))
    assert gone.returncode == 1, time.monotonic() - started
    assert "missing before it" in gone.stdout
