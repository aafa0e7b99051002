"""Who takes and gives up which partition, and whose lease counts."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tether.domain.partition import plan
from tether.modelstore.upkeep.partitions import StoreInstance


def settled(partitions: int, stores: list[str], owners: dict[int, str]) -> dict[int, str]:
    """What the leases are when every store has acted until nobody wants to."""
    for name in itertools.chain.from_iterable(itertools.repeat(stores, 3 * partitions)):
        take, leave = plan(name, partitions, owners, stores)
        owners = {number: owner for number, owner in owners.items() if number not in leave}
        owners |= dict.fromkeys(take, name)
    return owners


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_all_partitions_are_looked_after_and_nobody_has_more_than_a_share(partitions: int, count: int) -> None:
    stores = [f"s{number}" for number in range(count)]
    alone = settled(partitions, stores[:1], {})
    assert alone == dict.fromkeys(range(partitions), "s0")
    shared = settled(partitions, stores, alone)
    assert set(shared) == set(range(partitions))
    assert max(list(shared.values()).count(name) for name in stores) <= -(-partitions // count)


def test_what_a_silent_one_had_is_taken_and_what_a_living_one_has_is_not() -> None:
    owners = {0: "gone", 1: "other", 2: "", 3: "own"}
    assert plan("own", 5, owners, ["other", "own"]) == ([0, 2], [])
    assert plan("own", 5, owners, ["other"]) == ([0, 2], [])


def test_a_settled_share_stays_as_it_is() -> None:
    owners = settled(8, ["a", "b", "c"], {})
    assert [plan(name, 8, owners, ["a", "b", "c"]) for name in "abc"] == [([], [])] * 3


def test_an_instance_knows_which_of_its_neighbours_is_dead(tmp_path: Path) -> None:
    scratch = tmp_path / "cache" / "modelstore"
    first = StoreInstance(scratch)
    (first.folder / "push-1").mkdir()
    second = StoreInstance(scratch)
    assert second.dead == frozenset()
    assert (first.folder / "push-1").is_dir()
    assert first._lock is not None

    os.close(first._lock)
    third = StoreInstance(scratch)
    assert third.dead == {first.name}
    assert sorted(path.name for path in scratch.iterdir()) == sorted([second.name, third.name])
    second.close()
    third.close()
    assert not list(scratch.iterdir())
