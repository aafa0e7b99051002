"""Promote and roll back under load on a whole platform, as ``bench/rollout.py`` measures it, and that it can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from support.platform.platforms import ROOT

from bench.rollout import Watch
from bench.servers import environment

# limits of time are for the bench on a machine of its own
PATIENT = ("--rate", "1000", "--rounds", "3", "--hold", "0.3", "--follow", "15")


@pytest.mark.timeout(300)
def test_a_thousand_requests_a_second_are_all_answered_while_versions_are_moved() -> None:
    """Each by exactly the version that it names, and by every worker soon after each move."""
    words = [sys.executable, "-m", "bench.rollout", *PATIENT]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = re.findall(r"requests, failed \| ([\d,]+), (\d+) \|", done.stdout)
    assert int(found[0].replace(",", "")) > 500
    assert found[1] == "0"
    assert done.stderr.count("promote: every worker after") == 3
    assert done.stderr.count("rollback: every worker after") == 3


def answer(names: str, ran: int, status: str = "200 OK") -> bytes:
    outputs = [{"name": "version", "data": [ran]}, {"name": "process", "data": [7]}]
    body = json.dumps({"model_version": names, "outputs": outputs}).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("told", "errors"),
    [(answer("2", 2), 0), (answer("2", 1), 1), (answer("1", 1, "503 Service Unavailable"), 1)],
)
def test_an_answer_of_another_version_than_it_names_is_a_failure(told: bytes, errors: int) -> None:
    watch = Watch()
    watch.answered(time.perf_counter(), told)
    assert (watch.errors, bool(watch.first_error)) == (errors, bool(errors))
