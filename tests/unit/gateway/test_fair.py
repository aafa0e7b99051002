"""Who is next, and how much goes at once: no time, no I/O."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.gateway_http.fair_queue import JOB_BYTES, FairQueue, RunTimeEstimator

MANY = 1 << 30


def queue(**weights: float) -> FairQueue[str]:
    return FairQueue(lambda tenant: weights.get(tenant, 1.0))


def taken(waiting: FairQueue[str], count: int, size: int = MANY) -> list[str]:
    return waiting.take(count, size, lambda _: True)


def test_one_tenants_jobs_keep_their_order() -> None:
    waiting = queue()
    for number in range(10):
        waiting.add("a", f"a{number}", 100)
    assert taken(waiting, 4) == ["a0", "a1", "a2", "a3"]
    assert taken(waiting, 100) == ["a4", "a5", "a6", "a7", "a8", "a9"]
    assert (len(waiting), waiting.size, taken(waiting, 1)) == (0, 0, [])


def test_a_flood_waits_behind_itself() -> None:
    waiting = queue()
    for number in range(1000):
        waiting.add("flood", f"f{number}", 100)
    assert taken(waiting, 3) == ["f0", "f1", "f2"]
    waiting.add("calm", "c0", 100)
    waiting.add("calm", "c1", 100)
    assert taken(waiting, 4) == ["c0", "f3", "c1", "f4"]
    assert taken(waiting, 2) == ["f5", "f6"]
    waiting.add("calm", "c2", 100)
    assert taken(waiting, 2) == ["c2", "f7"]


@pytest.mark.parametrize(("heavy", "light"), [(1.0, 1.0), (3.0, 1.0), (1.0, 0.25), (10.0, 0.5)])
def test_tenants_that_all_wait_get_their_weights(heavy: float, light: float) -> None:
    waiting = queue(heavy=heavy, light=light)
    for _ in range(2000):
        waiting.add("light", "light", 1000)
        waiting.add("heavy", "heavy", 1000)
    found = Counter(taken(waiting, 1000))
    assert found["heavy"] / found["light"] == pytest.approx(heavy / light, rel=0.05)


def test_large_jobs_cost_more_turns_than_small_ones() -> None:
    waiting = queue()
    for _ in range(1000):
        waiting.add("large", "large", 10 * JOB_BYTES - JOB_BYTES)
        waiting.add("small", "small", 0)
    found = Counter(taken(waiting, 550))
    assert found["small"] == pytest.approx(10 * found["large"], rel=0.05)


def test_a_tenant_that_comes_back_at_once_gets_no_more_than_its_weight() -> None:
    waiting = queue(poor=0.1)
    waiting.add("poor", "poor", 100)
    for _ in range(1000):
        waiting.add("rich", "rich", 100)
    found: Counter[str] = Counter()
    for _ in range(500):
        (item,) = taken(waiting, 1)
        found[item] += 1
        if item == "poor":
            waiting.add("poor", "poor", 100)
    assert found["poor"] == pytest.approx(500 / 11, abs=3)


def test_a_message_has_room_for_so_much() -> None:
    waiting = queue()
    for size in (600, 600, 100):
        waiting.add("a", str(size), size)
    assert taken(waiting, 10, 1000) == ["600"]
    assert taken(waiting, 10, 500) == ["600"]
    assert taken(waiting, 10, 10) == ["100"]


def test_what_nobody_waits_for_takes_no_place() -> None:
    waiting = queue()
    for number in range(6):
        waiting.add("a", str(number), 100)
    assert waiting.take(2, MANY, lambda item: item not in ("0", "2", "4", "5")) == ["1", "3"]
    assert waiting.take(2, MANY, lambda item: item not in ("4", "5")) == []
    assert (len(waiting), waiting.size) == (0, 0)


def test_tenants_at_rest_are_forgotten() -> None:
    waiting = queue()
    for number in range(5000):
        waiting.add(f"tenant-{number}", "job", 10)
        assert taken(waiting, 1) == ["job"]
    assert len(waiting._flows) <= 600


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5000)), max_size=200),
    st.integers(1, 20),
    st.integers(1, 10_000),
)
def test_nothing_is_lost_and_each_tenants_order_is_kept(jobs: list[tuple[str, int]], count: int, size: int) -> None:
    waiting: FairQueue[tuple[str, int]] = FairQueue(lambda tenant: 1.0 + ord(tenant) % 3)
    for number, (tenant, own) in enumerate(jobs):
        waiting.add(tenant, (tenant, number), own)
    found: list[tuple[str, int]] = []
    while waiting:
        part = waiting.take(count, size, lambda _: True)
        assert 1 <= len(part) <= count
        found += part
    assert sorted(found, key=lambda item: item[1]) == [(tenant, number) for number, (tenant, _) in enumerate(jobs)]
    for name in "abc":
        own_order = [number for tenant, number in found if tenant == name]
        assert own_order == sorted(own_order)


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.005), (0.01, 0.0001), (0.0002, 0.000003), (0.002, 0.001)])
def test_a_bundle_is_as_large_as_its_time_allows(fixed: float, each: float) -> None:
    """Learned while it decides, from spans that vary by a fifth."""
    noise, pace, jobs = random.Random(5), RunTimeEstimator(), 256
    for _ in range(300):
        pace.learn(jobs, (fixed + each * jobs) * noise.uniform(0.8, 1.2))
        jobs = pace.most(256, 0.005)
    span = fixed + each * jobs
    assert span <= 2.6 * max(0.005, 2 * fixed)
    assert jobs == 256 or span >= min(0.005, 2 * fixed + each) / 2.6


@pytest.mark.parametrize("seed", range(5))
def test_on_a_busy_machine_bundles_do_not_shrink_to_one_job(seed: int) -> None:
    """Each run takes long, whatever is in it: a queue that sends one job a message grows without end."""
    noise, pace, jobs, sizes = random.Random(seed), RunTimeEstimator(), 1, []
    for _ in range(200):
        pace.learn(jobs, noise.uniform(0.05, 0.8))
        jobs = pace.most(64, 0.025)
        sizes.append(jobs)
    assert max(sizes[:20]) >= 16, "it is found out soon"
    assert sum(sizes) / len(sizes) > 8


@pytest.mark.parametrize("seed", range(5))
def test_jobs_that_take_long_each_stay_alone(seed: int) -> None:
    noise, pace, jobs, sizes = random.Random(seed), RunTimeEstimator(), 1, []
    for _ in range(200):
        pace.learn(jobs, 0.05 * jobs * noise.uniform(0.9, 1.1))
        jobs = pace.most(64, 0.025)
        sizes.append(jobs)
    assert sum(sizes) / len(sizes) < 1.2
    assert max(sizes) <= 4


def test_where_more_jobs_take_no_longer_a_bundle_may_be_full() -> None:
    """A span that is the same whatever is in it left nothing to divide by: the lane's sender died, and nobody was answered."""
    pace, span_s = RunTimeEstimator(), 2.0**-5
    for jobs in (1, 2, 4, 8):
        pace.learn(jobs, span_s)
    assert pace.most(256, 0.005) == 256


@given(
    st.lists(st.tuples(st.integers(1, 256), st.sampled_from([1e-9, 0.01, 0.5, 2.0**-5, 3600.0, 1e300])), max_size=20)
)
def test_whatever_was_learned_a_bundle_has_a_size(bundles: list[tuple[int, float]]) -> None:
    pace = RunTimeEstimator()
    for jobs, span_s in bundles:
        pace.learn(jobs, span_s)
        assert 1 <= pace.most(256, 0.005) <= 256


def test_before_anything_was_learned_a_bundle_may_be_full() -> None:
    assert RunTimeEstimator().most(256, 0.005) == 256


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5000)), max_size=40),
    st.integers(0, 20),
    st.sets(st.integers(0, 39)),
)
def test_what_is_pruned_is_as_if_it_were_passed_over(
    added: list[tuple[str, int]], first: int, unwanted: set[int]
) -> None:
    """The same jobs in the same order, and nothing is held for the others."""
    pruned, lazy = queue(), queue()
    for waiting in (pruned, lazy):
        for number, (tenant, size) in enumerate(added):
            waiting.add(tenant, str(number), size)
        taken(waiting, first)

    def wanted(item: str) -> bool:
        return int(item) not in unwanted

    pruned.prune(wanted)
    rest = [number for number in range(len(added)) if wanted(str(number))]
    assert len(pruned) <= len(rest)
    found = pruned.take(100, MANY, lambda _: True)
    assert sorted(found) == sorted(lazy.take(100, MANY, wanted))
    assert (len(pruned), pruned.size) == (0, 0)
    pruned.add("a", "again", 7)
    assert (len(pruned), pruned.size, taken(pruned, 1)) == (1, 7, ["again"])
