"""Room for models in a worker: who gets it, who gives it up, and who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tether.domain.manifest import ModelRef
from tether.errors import Unavailable
from tether.frameworks.runtime import Runtime
from tether.worker.models import memory_budget as module
from tether.worker.models.instances import InstancePool, InstanceSet
from tether.worker.models.memory_budget import Memory
from tether.worker.models.run_limits import RunWatch

A, B, C, D = (ModelRef(name, 1) for name in "abcd")
MB = 1 << 20


class Ticks:
    """A clock that is one second later whenever it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def utc(self) -> float:
        return self.monotonic()


class House:
    """Versions of one megabyte each in a memory of a few."""

    def __init__(self, megabytes: int) -> None:
        self.memory = Memory(megabytes * MB, self._evictable)
        self.copies: dict[ModelRef, InstancePool] = {}
        self.pinned: set[ModelRef] = set()
        self.loads: list[str] = []
        self.clock = Ticks()

    def _evictable(self) -> list[tuple[ModelRef, InstancePool]]:
        return [(ref, one) for ref, one in self.copies.items() if one.loaded and one.idle and ref not in self.pinned]

    def add(self, *refs: ModelRef, size: int = MB) -> None:
        for ref in refs:
            self.copies[ref] = InstancePool(lambda ref=ref: self._load(ref, size), self.clock, self.memory.wake_waiters)  # type: ignore[misc]

    async def _load(self, ref: ModelRef, size: int) -> InstanceSet:
        await self.memory.reserve(ref, size)
        self.loads.append(ref.model)
        runtimes: Sequence[Runtime] = ()
        return InstanceSet(runtimes, self.clock, RunWatch(0), ref.model)

    async def use(self, *refs: ModelRef) -> None:
        for ref in refs:
            async with self.copies[ref].pinned():
                await self.copies[ref].ensure()

    def loaded(self) -> str:
        return "".join(ref.model for ref, one in self.copies.items() if one.loaded)


async def test_the_one_that_was_not_used_for_the_longest_time_makes_room() -> None:
    house = House(2)
    house.add(A, B, C)
    await house.use(A, B, A, C)
    assert (house.loaded(), house.loads) == ("ac", ["a", "b", "c"])
    await house.use(B)
    assert house.loaded() == "bc"
    assert (house.memory.taken(A), house.memory.taken(B)) == (0, MB)


async def test_what_is_pinned_stays() -> None:
    house = House(2)
    house.add(A, B, C)
    house.pinned.add(A)
    await house.use(A, B, C)
    assert house.loaded() == "ac"


async def test_without_a_budget_nothing_is_unloaded() -> None:
    house = House(0)
    house.add(A, B, C, size=1 << 60)
    await house.use(A, B, C)
    assert house.loaded() == "abc"


async def test_who_comes_while_others_are_in_use_waits_and_is_served_in_order() -> None:
    house = House(1)
    house.add(A, B, C)
    async with house.copies[A].pinned():
        await house.copies[A].ensure()
        waiting = [asyncio.create_task(house.use(ref)) for ref in (B, C)]
        while len(house.memory._waiting) < 2:
            await asyncio.sleep(0)
        assert house.loaded() == "a"
    await asyncio.gather(*waiting)
    assert house.loads == ["a", "b", "c"]
    assert house.loaded() == "c"


async def test_what_is_taken_ahead_unloads_nothing_and_passes_nobody_who_waits() -> None:
    house = House(2)
    house.add(A, B, C)
    await house.use(A)
    assert house.memory.take(D, MB)
    assert not house.memory.take(B, MB)
    assert (house.loaded(), house.memory.taken(D), house.memory.taken(B)) == ("a", MB, 0)
    house.memory.change(D, 0)
    async with house.copies[A].pinned():
        waiting = asyncio.create_task(house.memory.reserve(C, 2 * MB))
        while not house.memory._waiting:
            await asyncio.sleep(0)
        assert not house.memory.take(D, MB)
    await waiting
    assert house.loaded() == ""


async def test_nothing_is_unloaded_for_who_would_not_fit_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.01)
    house = House(3)
    house.add(A, B)
    house.add(D, size=3 * MB)
    house.pinned.add(A)
    await house.use(A, B)
    with pytest.raises(Unavailable, match="need 3 MiB, all loaded models are pinned or in use"):
        await house.use(D)
    assert house.loaded() == "ab"
    house.pinned.clear()
    await house.use(D)
    assert house.loaded() == "d"


async def test_who_never_fits_is_refused_at_once() -> None:
    house = House(2)
    house.add(A, size=2 * MB + 1)
    with pytest.raises(Unavailable, match="need 3 MiB, worker_memory_mb is 2"):
        await house.use(A)


async def test_who_gives_up_waiting_leaves_the_way_to_the_next() -> None:
    house = House(2)
    house.add(A, C)
    house.add(B, size=2 * MB)
    async with house.copies[A].pinned():
        await house.copies[A].ensure()
        large = asyncio.create_task(house.use(B))
        while not house.memory._waiting:
            await asyncio.sleep(0)
        small = asyncio.create_task(house.use(C))
        while len(house.memory._waiting) < 2:
            await asyncio.sleep(0)
        large.cancel()
        await small
    assert house.loaded() == "ac"


async def test_a_load_anew_counts_instead_of_what_was_there() -> None:
    house = House(2)
    house.add(A, size=2 * MB)
    await house.use(A)
    await house.copies[A].renew(1.0)
    assert (house.loads, house.memory.taken(A)) == (["a", "a"], 2 * MB)
