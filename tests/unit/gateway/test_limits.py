"""Limits as several gateways count them together, on a clock and a network of the test's own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.gateway_http.access.limit_meters import (
    SILENT_S,
    TICK_S,
    DistributedSemaphore,
    DistributedTokenBucket,
    LimitReport,
    Meter,
    allotment,
)


class Cluster:
    """Gateways that report every ``TICK_S``, each at its own moment, over a network that takes a few milliseconds."""

    def __init__(self, count: int, make: Callable[[str, dict[str, float]], Meter], *, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = 0
        self.names = [f"g{index}" for index in range(count)]
        self.meters = {name: make(name, {other: 0.0 for other in self.names if other != name}) for name in self.names}
        self.dead: set[str] = set()
        for name in self.names:
            self.at(self.random.random() * TICK_S, lambda name=name: self._tick(name))  # type: ignore[misc]

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what))

    def _tick(self, name: str) -> None:
        if name in self.dead:
            return
        self.meters[name].tick(self.now)
        self.tell(name)
        self.at(self.now + TICK_S, lambda: self._tick(name))

    def tell(self, name: str) -> None:
        report = self.meters[name].report("x", self.now)
        for other in self.names:
            if other not in (name, *self.dead):
                self.at(self.now + 0.003, lambda other=other: self._hear(other, name, report))  # type: ignore[misc]

    def _hear(self, gateway: str, sender: str, report: LimitReport) -> None:
        known = sender in getattr(self.meters[gateway], "peers")  # noqa: B009 - the network knows no types
        self.meters[gateway].heard(sender, report, self.now)
        if not known:
            self.tell(gateway)

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        self.now = until


def flood(cluster: Cluster, per_s: dict[str, float], start: float, end: float, taken: list[tuple[float, str]]) -> None:
    """Requests at random moments, so many a second at each gateway."""

    def ask(name: str, rate: float) -> None:
        if name in cluster.dead:
            return
        meter = cluster.meters[name]
        assert isinstance(meter, DistributedTokenBucket)
        asleep = not meter.demand
        if meter.take(cluster.now):
            taken.append((cluster.now, name))
        if asleep:
            cluster.tell(name)
        later(name, rate)

    def later(name: str, rate: float) -> None:
        when = max(cluster.now, start) + cluster.random.expovariate(rate)
        if when < end:
            cluster.at(when, lambda: ask(name, rate))

    for name, rate in per_s.items():
        if rate:
            later(name, rate)


def rates(count: int, rate: float, burst: float) -> Cluster:
    return Cluster(count, lambda own, members: DistributedTokenBucket(rate, burst, own, members, 0.0))


def test_one_gateway_counts_to_the_token() -> None:
    meter = DistributedTokenBucket(10.0, 5, "g", {}, 0.0)
    assert [meter.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert meter.remaining == 0
    assert meter.next_in_s == pytest.approx(0.1)
    assert meter.full_in_s == pytest.approx(0.5)
    assert meter.take(0.1)
    assert not meter.take(0.1)
    assert [meter.take(10.0) for _ in range(6)] == [True] * 5 + [False]


def test_without_a_burst_a_second_of_requests_may_come_at_once() -> None:
    meter = DistributedTokenBucket(3.5, 0, "g", {}, 0.0)
    assert [meter.take(0.0) for _ in range(5)] == [True] * 4 + [False]


def test_what_is_counted_later_leaves_a_debt() -> None:
    meter = DistributedTokenBucket(10.0, 5, "g", {}, 0.0)
    assert meter.take(0.0)
    meter.charge(99, 0.0)
    assert meter.remaining == 0
    assert not meter.take(9.0)
    assert meter.next_in_s == pytest.approx(0.6)
    assert meter.take(9.7)


def test_a_limit_that_was_changed_holds_at_once() -> None:
    meter = DistributedTokenBucket(10.0, 5, "g", {}, 0.0)
    while meter.take(0.0):
        pass
    meter.configure(1000.0, 100, 0.0)
    assert sum(meter.take(0.05) for _ in range(200)) == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    "demand", [(900, 0, 0), (300, 300, 300), (800, 90, 10), (500, 20, 0)], ids=["one", "equal", "skewed", "two"]
)
@pytest.mark.parametrize(("rate", "burst"), [(100.0, 100), (100.0, 10), (400.0, 40)])
def test_the_gateways_together_let_in_what_one_would(demand: tuple[int, ...], rate: float, burst: int) -> None:
    cluster = rates(3, rate, burst)
    taken: list[tuple[float, str]] = []
    flood(cluster, dict(zip(cluster.names, demand, strict=True)), 0.0, 10.0, taken)
    cluster.run(10.0)
    allowed = burst + 10.0 * min(rate, sum(demand))
    assert len(taken) == pytest.approx(allowed, rel=0.1)


def test_a_demand_that_jumps_from_one_gateway_to_another_finds_the_same_limit() -> None:
    cluster = rates(3, 100.0, 50)
    taken: list[tuple[float, str]] = []
    for turn in range(6):
        flood(cluster, {cluster.names[turn % 3]: 600.0}, 2.0 * turn, 2.0 * turn + 2.0, taken)
    cluster.run(12.0)
    assert len(taken) == pytest.approx(50 + 1200, rel=0.1)
    in_turn = [sum(2 * turn <= at < 2 * turn + 2 for at, _ in taken) for turn in range(6)]
    assert all(count >= 130 for count in in_turn), in_turn


def test_an_exhausted_bucket_is_not_full_elsewhere() -> None:
    cluster = rates(2, 10.0, 100)
    taken: list[tuple[float, str]] = []
    flood(cluster, {"g0": 1000.0}, 0.0, 1.0, taken)
    flood(cluster, {"g1": 1000.0}, 1.0, 2.0, taken)
    cluster.run(2.0)
    assert len(taken) == pytest.approx(100 + 20, rel=0.1)


def test_the_share_of_a_gateway_that_died_flows_back() -> None:
    cluster = rates(3, 100.0, 20)
    taken: list[tuple[float, str]] = []
    flood(cluster, dict.fromkeys(cluster.names, 300.0), 0.0, 9.0, taken)
    cluster.run(3.0)
    cluster.dead = {"g1", "g2"}
    cluster.run(9.0)
    after = [at for at, _ in taken if at > 3.0 + SILENT_S + 2 * TICK_S]
    assert len(after) / (9.0 - 3.0 - SILENT_S - 2 * TICK_S) == pytest.approx(100, rel=0.1)


def test_a_new_gateway_gets_its_share_and_no_bucket_of_its_own() -> None:
    cluster = rates(3, 100.0, 100)
    taken: list[tuple[float, str]] = []
    flood(cluster, {"g0": 300.0}, 0.0, 6.0, taken)
    flood(cluster, {"g1": 300.0, "g2": 300.0}, 3.0, 6.0, taken)
    cluster.run(6.0)
    late = [name for at, name in taken if at > 4.0]
    assert len(late) == pytest.approx(200, rel=0.1)
    assert all(late.count(name) == pytest.approx(67, rel=0.35) for name in cluster.names)


def test_slots_of_one_gateway() -> None:
    meter = DistributedSemaphore(2, "g", {}, 0.0)
    assert [meter.take(0.0) for _ in range(3)] == [True, True, False]
    meter.give_back()
    assert meter.take(0.0)
    assert meter.remaining == 0


@pytest.mark.parametrize("demand", [(60, 0, 0), (20, 20, 20), (50, 8, 2), (4, 3, 3)])
def test_slots_of_the_gateways_add_up(demand: tuple[int, ...]) -> None:
    """Closed loops: each caller holds a slot for 50 ms, or tries again after 20 ms."""
    cluster = Cluster(3, lambda own, members: DistributedSemaphore(20, own, members, 0.0))
    open_now: list[int] = []

    def ask(name: str) -> None:
        meter = cluster.meters[name]
        assert isinstance(meter, DistributedSemaphore)
        asleep = not meter.demand
        if meter.take(cluster.now):
            cluster.at(cluster.now + 0.05, lambda: end(name))
        else:
            cluster.at(cluster.now + 0.02, lambda: ask(name))
        if asleep:
            cluster.tell(name)

    def end(name: str) -> None:
        meter = cluster.meters[name]
        assert isinstance(meter, DistributedSemaphore)
        meter.give_back()
        cluster.at(cluster.now + 0.001, lambda: ask(name))

    def look() -> None:
        open_now.append(sum(meter.open for meter in cluster.meters.values() if isinstance(meter, DistributedSemaphore)))
        cluster.at(cluster.now + 0.01, look)

    for name, callers in zip(cluster.names, demand, strict=True):
        for _ in range(callers):
            cluster.at(cluster.random.random() * 0.1, lambda name=name: ask(name))  # type: ignore[misc]
    cluster.at(2.0, look)
    cluster.run(8.0)
    assert max(open_now) <= 22
    assert sum(open_now) / len(open_now) == pytest.approx(min(20, sum(demand)), rel=0.1)


@given(st.integers(1, 500), st.dictionaries(st.text(max_size=3), st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_parts_add_up_to_the_whole(limit: int, wanted: dict[str, float]) -> None:
    parts = allotment(limit, wanted)
    assert sum(parts.values()) == limit
    whole = sum(wanted.values())
    assert all(abs(parts[name] - limit * wanted[name] / whole) <= 1 for name in wanted)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 0.5), max_size=200), st.floats(0.5, 200), st.integers(0, 50))
def test_no_run_of_requests_gets_more_than_the_bucket_holds(pauses: list[float], rate: float, burst: int) -> None:
    meter = DistributedTokenBucket(rate, burst, "g", {}, 0.0)
    now, taken = 0.0, 0
    for pause in pauses:
        now += pause
        taken += meter.take(now)
        if len(pauses) % 3 == 0:
            meter.tick(now)
    assert taken <= meter.burst + rate * now + 1e-6
