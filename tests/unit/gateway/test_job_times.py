"""Times of a job that were told by machines whose clocks are apart."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tether.domain.job import AttemptNote, JobId, JobRecord, JobState, Outcome, Priority
from tether.gateway_http.jobs.view import JobSnapshot, view
from tether.process.clock import AnchoredClock, SystemClock

SUBMITTED = 1_800_000_000.0


def shown(started: float, finished: float, state: JobState = JobState.SUCCEEDED) -> dict[str, Any]:
    return view(JobSnapshot(record(), Outcome(JobId("j"), state, (), None, 1, "worker-1", started, finished)))


def record() -> JobRecord:
    return JobRecord(
        id=JobId("j"),
        tenant="acme",
        model="bump",
        version=1,
        priority=Priority.NORMAL,
        submitted_at=SUBMITTED,
        deadline=SUBMITTED + 60,
        digest="",
        bundle="b",
        request_id="",
    )


def at(text: str) -> float:
    return round(datetime.fromisoformat(text).timestamp() - SUBMITTED, 3)


@pytest.mark.parametrize(
    ("started", "finished", "told"),
    [(1.0, 1.5, (1.0, 1.5)), (-20.0, -19.5, (0.0, 0.5)), (-0.2, 0.3, (0.0, 0.5)), (2.0, 1.0, (2.0, 2.0))],
)
def test_no_job_ends_before_it_was_submitted(started: float, finished: float, told: tuple[float, float]) -> None:
    job = shown(SUBMITTED + started, SUBMITTED + finished)
    assert (at(job["started_at"]), at(job["finished_at"])) == told


def test_a_job_that_never_ran_does_not_end_before_it_was_submitted_either() -> None:
    job = shown(0.0, SUBMITTED - 5, JobState.CANCELLED)
    assert at(job["finished_at"]) == 0.0
    assert "started_at" not in job


def test_a_job_that_runs_did_not_start_before_it_was_submitted() -> None:
    job = view(JobSnapshot(record(), None, AttemptNote(1, "worker-1", SUBMITTED - 20)))
    assert at(job["started_at"]) == 0.0


class Hands(SystemClock):
    """A clock whose hands a test moves."""

    def __init__(self) -> None:
        self.since_start = 100.0
        self.of_day = SUBMITTED - 20

    def monotonic(self) -> float:
        return self.since_start

    def utc(self) -> float:
        return self.of_day

    def utc_ms(self) -> int:
        return int(self.of_day * 1000)


def test_a_clock_goes_by_another_machines_and_is_not_moved_when_its_own_is_set() -> None:
    clock = AnchoredClock(own := Hands())
    assert (clock.utc(), clock.utc_ms()) == (SUBMITTED - 20, int((SUBMITTED - 20) * 1000))
    clock.anchor(SUBMITTED)
    own.since_start += 7.0
    own.of_day += 3600.0
    assert clock.utc() == SUBMITTED + 7
    assert clock.utc_ms() == int((SUBMITTED + 7) * 1000)
    assert clock.monotonic() == 107.0
