"""In how many places a worker waits for jobs: what it measures, what follows, and when it changes its mind."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from tether.dispatcher.worker_capacity import CapacityBaseline
from tether.domain.job import SHARED
from tether.domain.manifest import Heartbeat, ModelRef
from tether.model.config import LoadBalancing
from tether.worker.models.gpu import Gpus
from tether.worker.models.machine import Machine
from tether.worker.scheduling.pull_balance import MOST, Capacity, Headroom, turns

REF = ModelRef("m", 1)
ENOUGH = Headroom(1.0, 1.0, 1.0)


def settled(capacity: Capacity, *, factor: float = 1.0, copies: int = 1, least: float = 0.0) -> Capacity:
    for _ in range(60):
        capacity.update(factor, copies, least)
    return capacity


def measured(seconds: float) -> Capacity:
    capacity = Capacity()
    capacity.record_run(seconds, 1)
    return capacity


def test_each_strategy_has_its_number_of_places() -> None:
    able = settled(measured(0.01), least=20.0)
    found = {strategy.value: turns(strategy, 3, able) for strategy in LoadBalancing}
    assert found == {"least_connections": 0, "round_robin": 1, "weighted_round_robin": 3, "capacity": 5}


def test_a_worker_that_has_measured_nothing_waits_in_one_place() -> None:
    assert settled(Capacity(), least=1.0).turns == 1
    assert settled(Capacity(), least=1.0).level == 0
    assert settled(measured(0.1)).turns == 1, "and so does one that does not know the others"


@pytest.mark.parametrize(
    ("ran_s", "jobs", "copies", "factor", "level"),
    [(0.1, 1, 1, 1.0, 10), (0.1, 4, 1, 1.0, 40), (0.1, 1, 3, 1.0, 30), (0.1, 1, 1, 0.5, 5), (0.0, 1, 1, 1.0, 1e6)],
)
def test_the_level_is_jobs_a_second(ran_s: float, jobs: int, copies: int, factor: float, level: float) -> None:
    capacity = Capacity()
    capacity.record_run(ran_s, jobs)
    assert settled(capacity, factor=factor, copies=copies).level == pytest.approx(level)


@pytest.mark.parametrize("least", [1e-9, 1e-3, 1.0, 10.0, 100.0, 1e9, math.inf])
def test_nobody_gets_less_than_one_place_nor_more_than_the_most(least: float) -> None:
    for factor in (0.0, 0.1, 1.0):
        assert 1 <= settled(measured(0.1), factor=factor, least=least).turns <= MOST


def test_a_number_of_places_does_not_flap() -> None:
    """A level that goes to and fro by a third moves nothing; one that stays somewhere else does, and not at once."""
    capacity = settled(measured(0.05), least=10.0)
    assert capacity.turns == 2
    seen = set()
    for beat in range(100):
        capacity.update(1.0 if beat % 2 else 0.66, 1, 10.0)
        seen.add(capacity.turns)
    assert seen == {2}
    capacity.update(1.0, 3, 10.0)
    assert capacity.turns < 6
    assert settled(capacity, copies=3, least=10.0).turns == 6


def test_one_slow_run_is_no_slow_worker() -> None:
    capacity = measured(0.01)
    settled(capacity, least=25.0)
    assert capacity.turns == 4
    capacity.record_run(0.02, 1)
    assert settled(capacity, least=25.0).turns == 4
    for _ in range(60):
        capacity.record_run(0.04, 1)
    assert settled(capacity, least=25.0).turns == 1


@pytest.mark.parametrize(
    ("headroom", "on_gpu", "factor"),
    [
        (ENOUGH, True, 1.0),
        (Headroom(0.5, 0.2, 0.2), True, 1.0),
        (Headroom(0.25, 1.0, 1.0), False, 0.5),
        (Headroom(1.0, 0.1, 1.0), False, 0.5),
        (Headroom(1.0, 1.0, 0.05), True, 0.25),
        (Headroom(1.0, 1.0, 0.05), False, 1.0),
        (Headroom(0.0, 1.0, 1.0), False, 0.0),
    ],
)
def test_a_machine_counts_as_whole_until_it_is_short_of_something(
    headroom: Headroom, on_gpu: bool, factor: float
) -> None:
    assert headroom.factor(on_gpu=on_gpu) == pytest.approx(factor)


# the dispatcher's part


def beat(worker: str, *levels: float, pool: str = SHARED, ready: bool = True) -> Heartbeat:
    held = (REF,) if ready else ()
    return Heartbeat(worker, 1, "local", held, (), 0, 2, 0.0, pool, levels=tuple((REF, level) for level in levels))


def test_the_least_able_worker_of_a_pool_is_the_measure() -> None:
    beats = [beat("a", 30.0), beat("b", 10.0), beat("c"), beat("d", 5.0, pool="acme"), beat("e", 1.0, ready=False)]
    living = {one.worker: one for one in beats}
    assert CapacityBaseline().least(living, {"d": "acme"}) == {(SHARED, REF): 10.0, ("acme", REF): 5.0}
    assert CapacityBaseline().least(living, {}) == {(SHARED, REF): 10.0}, (
        "who serves another pool than it may does not count"
    )


@pytest.mark.parametrize("level", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_level_that_is_none_is_not_taken(level: float) -> None:
    assert CapacityBaseline().least({"a": beat("a", level), "b": beat("b", 3.0)}, {}) == {(SHARED, REF): 3.0}


def test_workers_are_told_of_real_changes_only() -> None:
    levels = CapacityBaseline()
    told = [levels.least({"a": beat("a", level)}, {})[SHARED, REF] for level in (10.0, 11.0, 9.0, 13.0, 12.0, 2.0)]
    assert told == [10.0, 10.0, 10.0, 13.0, 13.0, 2.0]
    assert levels.least({}, {}) == {}


# the machine


def test_this_machine_is_measured() -> None:
    """While this process keeps a processor busy, that processor counts as its own."""
    machine = Machine()
    first = machine.measure()
    assert all(0 <= part <= 1 for part in first)
    began, worked, ticks = time.monotonic(), time.process_time(), os.sysconf("SC_CLK_TCK")
    while time.process_time() - worked < 40 / ticks:
        pass
    ours = (time.process_time() - worked) / (time.monotonic() - began) / (os.cpu_count() or 1)
    assert machine.measure().cpu >= 0.8 * ours
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < first.memory * total <= total


def test_the_memory_of_a_gpu_is_measured() -> None:
    gpus = Gpus()
    if not gpus._devices:
        assert gpus.free() == 1.0
        pytest.skip("this machine has no NVIDIA driver")
    assert 0 < gpus.free() <= 1


def kernel(root: Path, *, cpu: str, own: int, child: int, available: int, limit: str = "max") -> Machine:
    """Files as a kernel has them."""
    pid = os.getpid()
    group = root / "sys/fs/cgroup/tether/worker"
    files = {
        "proc/stat": f"cpu  {cpu}\ncpu0 0 0 0\n",
        f"proc/{pid}/stat": f"{pid} (a (b) c) S " + "0 " * 10 + f"{own} 0 0 0 20 0\n",
        f"proc/{pid}/task/{pid}/children": "77 78 \n",
        "proc/77/stat": "77 (model) S " + "0 " * 10 + f"{child} 0 0 0 20 0\n",
        "proc/meminfo": f"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n",
        "proc/self/cgroup": "0::/tether/worker\n",
        "sys/fs/cgroup/tether/worker/memory.max": limit,
        "sys/fs/cgroup/tether/worker/memory.current": "800",
        "sys/fs/cgroup/tether/worker/memory.stat": "anon 500\ninactive_file 300\n",
    }
    group.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return Machine(root, Gpus("no such library"))


def test_a_workers_own_time_and_that_of_its_models_is_not_taken_from_it(tmp_path: Path) -> None:
    machine = kernel(tmp_path, cpu="100 0 0 900 0 0 0 0 0 0", own=50, child=20, available=600)
    assert machine.measure() == Headroom(1.0, 0.6, 1.0)
    # of 100 ticks 30 were idle, 10 this process', 20 its model's, and 40 others'
    kernel(tmp_path, cpu="170 0 0 925 5 0 0 0 0 0", own=60, child=40, available=600)
    assert machine.measure() == Headroom(0.6, 0.6, 1.0)
    assert machine.measure().cpu == 0.6, "no time has passed"


def test_the_limit_of_a_container_counts_where_it_is_the_smaller(tmp_path: Path) -> None:
    looks = [
        kernel(tmp_path, cpu="1 0 0 9", own=0, child=0, available=600, limit=limit).measure().memory
        for limit in ("max", "1000", "100000")
    ]
    assert looks == [0.6, 0.5, 0.6]


def test_where_the_kernel_does_not_tell_there_is_enough(tmp_path: Path) -> None:
    assert Machine(tmp_path, Gpus("no such library")).measure() == ENOUGH
