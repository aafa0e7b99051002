"""Which run is next: order of levels, patience, joining, cutting, and jobs that are taken out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.platform.tickets import put

from tether.domain.job import Job, new_job_id
from tether.domain.tensor import from_numpy
from tether.worker.scheduling.job_turns import LEVELS, RunQueue
from tether.worker.scheduling.pull_pace import AHEAD_S, PullPace

CALLER, HIGH, NORMAL, LOW = range(LEVELS)


def job(rows: int = 1, width: int = 1) -> Job:
    return Job(new_job_id(), "acme", (from_numpy("x", np.zeros((rows, width), np.float32)),), 1.0)


def next_run(queue: RunQueue, most: int = 8, now: float = 0.0) -> list[str]:
    """The ids of the jobs of the next run."""
    level = next(level for level in queue.order(now) if queue.has(level))
    return [ticket.job.id for ticket in queue.take(level, most, now).tickets]


def test_between_two_runs_the_most_urgent_comes_first_however_much_waits() -> None:
    queue, low = RunQueue(0.0, 0.0), [job() for _ in range(4)]
    put(queue, LOW, *low)
    assert next_run(queue, most=0) == [low[0].id]
    levels = {level: job() for level in (NORMAL, CALLER, HIGH)}
    for level, one in levels.items():
        put(queue, level, one)
    order = [next_run(queue, most=0) for _ in range(6)]
    assert order == [[levels[level].id] for level in (CALLER, HIGH, NORMAL)] + [[one.id] for one in low[1:]]


def test_a_level_without_a_run_for_too_long_gets_one_and_no_more() -> None:
    queue = RunQueue(10.0, 0.0)
    low, high = [job() for _ in range(3)], [job() for _ in range(9)]
    put(queue, LOW, *low)
    put(queue, HIGH, *high)
    runs = [next_run(queue, 0, float(now))[0] for now in (1, 5, 11, 12, 20, 21, 22)]
    names = {str(one.id): "low" for one in low} | {str(one.id): "high" for one in high}
    assert [names[run] for run in runs] == ["high", "high", "low", "high", "high", "high", "low"]


def test_of_two_that_waited_too_long_the_one_that_waited_longer_is_first() -> None:
    queue = RunQueue(10.0, 0.0)
    put(queue, LOW, job())
    queue.mark_served(NORMAL, 3.0)
    assert queue.order(12.0)[:2] != [NORMAL, LOW]
    queue.mark_served(CALLER, 20.0)
    queue.mark_served(HIGH, 20.0)
    assert queue.order(21.0) == [LOW, NORMAL, CALLER, HIGH]


def test_without_patience_order_is_strict_for_ever() -> None:
    assert RunQueue(0.0, 0.0).order(1e9) == [CALLER, HIGH, NORMAL, LOW]


def test_jobs_of_equal_shape_join_the_oldest_up_to_the_rows_of_a_run() -> None:
    queue = RunQueue(0.0, 0.0)
    first, wide, second, third = job(3), job(1, width=2), job(4), job(2)
    put(queue, NORMAL, first, wide)
    put(queue, NORMAL, second, third)
    assert [next_run(queue) for _ in range(3)] == [[first.id, second.id], [wide.id], [third.id]]


def test_jobs_of_other_levels_do_not_join() -> None:
    queue, one, other = RunQueue(0.0, 0.0), job(), job()
    put(queue, LOW, one)
    put(queue, HIGH, other)
    assert [next_run(queue), next_run(queue)] == [[other.id], [one.id]]


def test_a_job_that_is_alone_takes_a_turn_of_its_own() -> None:
    queue, jobs = RunQueue(0.0, 0.0), [job() for _ in range(3)]
    put(queue, NORMAL, *jobs[:2], alone=True)
    put(queue, NORMAL, jobs[2])
    assert [next_run(queue) for _ in range(3)] == [[one.id] for one in jobs]


def test_between_the_runs_of_a_job_that_takes_several_a_caller_is_served() -> None:
    queue, large, caller, small = RunQueue(0.0, 0.0), job(20), job(), job()
    put(queue, LOW, large)
    put(queue, LOW, small)
    assert next_run(queue) == [large.id]
    put(queue, CALLER, caller)
    assert [next_run(queue) for _ in range(3)] == [[caller.id], [large.id], [large.id, small.id]]
    assert not queue


def test_what_is_dropped_does_not_run_and_the_rest_keeps_its_order() -> None:
    queue, jobs = RunQueue(0.0, 0.0), [job() for _ in range(6)]
    put(queue, NORMAL, *jobs[:3])
    gone = put(queue, NORMAL, *jobs[3:5])
    put(queue, CALLER, jobs[5])
    dropped = queue.drop({jobs[0].id, jobs[5].id, "unknown"})
    assert {ticket.job.id for ticket in dropped} == {jobs[0].id, jobs[5].id}
    assert len(queue.remove(lambda ticket: ticket.bundle is gone)) == 2
    assert [next_run(queue, 0), next_run(queue, 0), len(queue)] == [[jobs[1].id], [jobs[2].id], 0]


def test_a_job_that_must_run_whole_comes_before_the_others_of_its_level() -> None:
    queue, large, other = RunQueue(0.0, 0.0), job(20), job()
    put(queue, NORMAL, large, other)
    turn = queue.take(NORMAL, 8, 0.0)
    queue.requeue_whole(turn.tickets[0])
    whole = queue.take(NORMAL, 8, 0.0)
    assert (whole.run.batched, whole.tickets, whole.run.segments[0].whole) == (False, turn.tickets, True)
    assert whole.parts != turn.parts, "the result of what ran before does not count"
    assert next_run(queue) == [other.id]


def test_a_cut_job_whose_version_is_not_batched_any_more_begins_again_as_it_came() -> None:
    queue, large = RunQueue(0.0, 0.0), job(20)
    put(queue, NORMAL, large)
    first = queue.take(NORMAL, 8, 0.0)
    second = queue.take(NORMAL, 0, 0.0)
    assert (first.run.rows, second.run.batched, second.run.segments[0].stop) == (8, False, 20)
    assert second.parts != first.parts
    assert not queue


def test_a_run_goes_on_without_the_jobs_that_are_late() -> None:
    queue, jobs = RunQueue(0.0, 0.0), [job(2), job(3), job(1)]
    put(queue, NORMAL, *jobs)
    turn = queue.take(NORMAL, 8, 0.0)
    left = turn.without([turn.tickets[1]])
    assert ([ticket.job for ticket in left.tickets], left.run.rows) == ([jobs[0], jobs[2]], 3)


# how much is asked for


def learned(run_s: float, jobs: int = 1) -> PullPace:
    pace = PullPace()
    for _ in range(20):
        pace.record_run(run_s, jobs)
        pace.record_message(jobs)
    return pace


def test_before_anything_is_known_a_lane_is_asked_for_what_can_begin_at_once() -> None:
    pace = PullPace()
    assert pace.pull_target(running=0, copies=3, waiting=0, most=8) == 3
    assert pace.pull_target(running=3, copies=3, waiting=0, most=8) == 0
    assert pace.pull_target(running=0, copies=3, waiting=1, most=8) == 0


def test_a_quick_model_is_asked_ahead() -> None:
    pace = learned(0.0001)
    assert pace.pull_target(running=1, copies=1, waiting=0, most=4) == 4
    assert pace.pull_target(running=1, copies=1, waiting=int(0.9 * AHEAD_S / 0.0001), most=64) < 64


@pytest.mark.parametrize("run_s", [2 * AHEAD_S, 1.0, math.inf])
def test_a_slow_model_is_asked_with_a_free_copy_only(run_s: float) -> None:
    pace = learned(run_s)
    assert pace.pull_target(running=1, copies=1, waiting=0, most=4) == 0
    assert pace.pull_target(running=0, copies=1, waiting=1, most=4) == 0
    assert pace.pull_target(running=0, copies=2, waiting=0, most=4) == 2


def test_what_waits_before_a_lane_counts() -> None:
    pace = learned(0.001)
    assert pace.pull_target(running=1, copies=1, waiting=3, most=4) == 4
    assert pace.pull_target(running=1, copies=1, waiting=40, most=4) == 0


def test_large_messages_are_asked_for_one_by_one() -> None:
    pace = learned(0.02, jobs=100)
    for _ in range(20):
        pace.record_message(300)
    assert pace.pull_target(running=0, copies=1, waiting=0, most=4) == 1


def test_one_run_out_of_many_that_takes_very_long_changes_nothing() -> None:
    pace = learned(0.001)
    pace.record_run(5.0, 1)
    assert pace.pull_target(running=1, copies=1, waiting=0, most=4) == 4
