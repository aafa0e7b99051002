"""Which workers are given which versions: by pool, labels, memory and replicas, and the same choice again and again."""

from __future__ import annotations

from collections.abc import Mapping

from tether.dispatcher.placement import Placement, PlacementInput, WorkerOffer, place
from tether.dispatcher.worker_inventory import FAILING_S, WorkerInventory
from tether.domain.job import SHARED
from tether.domain.manifest import Assignment, Heartbeat, ModelRef, Registration
from tether.model.config import Loading, ModelConfig

MB = 1 << 20


def versions(*names: str) -> tuple[ModelRef, ...]:
    return tuple(ModelRef(name, 1) for name in names)


def crew(count: int, memory: int = 0, **labels: str) -> dict[str, WorkerOffer]:
    return {f"w{number}": WorkerOffer(SHARED, labels, memory) for number in range(count)}


def placed(
    refs: tuple[ModelRef, ...], offers: Mapping[str, WorkerOffer], *configs: ModelConfig, **known: object
) -> Placement:
    sizes = dict.fromkeys(refs, 100 * MB)
    return place({SHARED: refs}, offers, PlacementInput(sizes, {one.model: one for one in configs}, **known))  # type: ignore[arg-type]


def holders(found: Placement, ref: ModelRef) -> set[str]:
    return {worker for worker, refs in found.held.items() if ref in refs}


def test_a_version_of_which_nothing_is_decided_is_held_by_every_worker_of_its_pool() -> None:
    a, b = versions("a", "b")
    offers = {
        "one": WorkerOffer(SHARED),
        "two": WorkerOffer(SHARED),
        "own": WorkerOffer("acme"),
        "lost": WorkerOffer("gone"),
    }
    found = place({SHARED: (a, b), "acme": (b,)}, offers, PlacementInput())
    assert found == Placement({"one": (a, b), "two": (a, b), "own": (b,), "lost": ()}, {})


def test_a_number_of_replicas_is_spread_and_only_its_share_moves_when_a_worker_goes() -> None:
    refs = versions(*[f"m{number}" for number in range(200)])
    configs = [ModelConfig(ref.model, replicas_max=2) for ref in refs]
    before = placed(refs, crew(5), *configs)
    assert before == placed(refs, dict(reversed(crew(5).items())), *configs)
    counts = [len(held) for held in before.held.values()]
    assert sum(counts) == 400
    assert min(counts) > 40
    less = crew(5)
    del less["w3"]
    after = placed(refs, less, *configs)
    for ref in refs:
        was = holders(before, ref)
        assert len(holders(after, ref)) == 2
        assert was - {"w3"} <= holders(after, ref)


def test_a_worker_needs_every_label() -> None:
    (a,) = versions("a")
    offers = {**crew(2, zone="eu"), "gpu": WorkerOffer(SHARED, {"zone": "eu", "gpu": "a100"})}
    assert holders(placed((a,), offers, ModelConfig("a", labels={"gpu": "a100", "zone": "eu"})), a) == {"gpu"}
    assert holders(placed((a,), offers, ModelConfig("a", labels={"zone": "eu"})), a) == {"w0", "w1", "gpu"}
    none = placed((a,), offers, ModelConfig("a", labels={"zone": "us", "gpu": "a100"}))
    assert holders(none, a) == set()
    reason = "no worker has the labels gpu=a100, zone=us; start one with them in 'worker_labels'"
    assert none.reasons == {(SHARED, a): reason}


def test_memory_goes_first_to_what_must_be_there_then_to_what_is_held_and_a_version_that_does_not_fit_says_so() -> None:
    a, b, c = versions("a", "b", "c")
    offers = crew(1, memory=250 * MB)
    assert placed((a, b, c), offers).held["w0"] == (a, b)
    assert placed((a, b, c), offers, ready={(SHARED, c): {"w0"}}).held["w0"] == (a, c)
    assert placed((a, b, c), offers, ModelConfig("b", pinned=True), ready={(SHARED, c): {"w0"}}).held["w0"] == (b, c)
    found = placed((a, b, c), offers, ModelConfig("c", replicas_min=1), ModelConfig("b", instances=2))
    assert found.held["w0"] == (a, c)
    assert found.reasons == {
        (SHARED, b): "need 200 MiB, and no worker that may host it has as much left of its worker_memory_mb; "
        "raise that, set loading to 'lazy', or start another worker"
    }


def test_newer_versions_go_before_older_ones() -> None:
    refs = tuple(ModelRef("a", number) for number in range(1, 5))
    assert placed(refs, crew(1, memory=200 * MB)).held["w0"] == refs[2:]


def test_what_is_loaded_lazily_needs_to_fit_and_reserves_nothing() -> None:
    refs = versions("a", "b", "c", "d")
    lazy = [ModelConfig(name, loading=Loading.LAZY) for name in "abd"]
    found = placed(refs, crew(1, memory=100 * MB), *lazy)
    assert found.held["w0"] == refs
    tight = placed(refs, crew(1, memory=99 * MB), *lazy)
    assert tight.held["w0"] == ()
    assert len(tight.reasons) == 4


def test_fewer_workers_than_replicas_min_are_told_of() -> None:
    (a,) = versions("a")
    offers = {**crew(2, memory=100 * MB), "small": WorkerOffer(SHARED, {}, MB)}
    found = placed((a,), offers, ModelConfig("a", replicas_min=3))
    assert holders(found, a) == {"w0", "w1"}
    assert found.reasons == {(SHARED, a): "2 of the 3 workers that replicas_min requires have memory for it"}


def test_who_is_not_chosen_any_more_answers_until_who_is_does() -> None:
    (a,) = versions("a")
    one = ModelConfig("a", replicas_max=1)
    (chosen,) = holders(placed((a,), crew(3), one), a)
    old, other = sorted({"w0", "w1", "w2"} - {chosen})
    assert holders(placed((a,), crew(3), one, ready={(SHARED, a): {old}}), a) == {chosen, old}
    assert holders(placed((a,), crew(3), one, ready={(SHARED, a): {old, other}}), a) == {chosen, old}
    assert holders(placed((a,), crew(3), one, ready={(SHARED, a): {old, chosen}}), a) == {chosen}
    assert holders(placed((a,), crew(3), one, ready={(SHARED, a): {"gone"}}), a) == {chosen}


def test_until_everybody_was_heard_nothing_moves_that_has_a_number_of_replicas() -> None:
    a, b = versions("a", "b")
    (chosen,) = holders(placed((a,), crew(2), ModelConfig("a", replicas_max=1)), a)
    (other,) = {"w0", "w1"} - {chosen}
    assigned = {chosen: Assignment(chosen, 1, (a, b)), other: Assignment(other, 1, (b,))}
    told = WorkerInventory(2.5, 8)
    told.record(other, Heartbeat(other, 1, "local", (b,), (), 0, 2, 0.0), 10.0)

    def now(at: float, *, listening: bool) -> dict[str, tuple[ModelRef, ...]]:
        configs = {"a": ModelConfig("a", replicas_max=1)}
        return told.place(
            {SHARED: (a, b)}, pools={}, assigned=assigned, living={}, configs=configs, now=at, listening=listening
        )

    assert now(10.0, listening=True) == {other: (b,)}
    assert told.reasons == {}
    assert now(12.0, listening=False) == {other: (a, b)}
    told.record(chosen, Registration(chosen, "local", 2, ()), 12.0)
    assert now(12.0, listening=True) == {chosen: (a, b), other: (b,)}
    assert now(13.0, listening=False) == {chosen: (a, b)}


def test_who_could_not_load_a_version_goes_after_the_others_for_a_while() -> None:
    (a,) = versions("a")
    (chosen,) = holders(placed((a,), crew(2), ModelConfig("a", replicas_max=1)), a)
    (other,) = {"w0", "w1"} - {chosen}
    told = WorkerInventory(1000.0, 8)
    told.record(other, Heartbeat(other, 1, "local", (), (), 0, 2, 0.0), 0.0)

    def says(at: float, ready: tuple[ModelRef, ...], failed: tuple[tuple[str, str], ...]) -> set[str]:
        told.record(chosen, Heartbeat(chosen, 1, "local", ready, failed, 0, 2, 0.0), at)
        held = told.place(
            {SHARED: (a,)},
            pools={},
            assigned={},
            living={},
            configs={"a": ModelConfig("a", replicas_max=1)},
            now=at,
            listening=False,
        )
        return {worker for worker, refs in held.items() if refs}

    assert says(0.0, (), ()) == {chosen}
    assert says(1.0, (), (("a:1", "why"),)) == {other}
    assert says(2.0, (), ()) == {other}
    assert says(1.0 + FAILING_S, (), ()) == {chosen}
    assert says(70.0, (a,), (("a:1", "another configuration cannot be loaded"),)) == {chosen}
    assert says(71.0, (), (("a:1", "why"), ("nonsense", ""), ("a:" + "9" * 5000, ""))) == {other}
    assert says(72.0, (a,), ()) == {chosen}
    alone = placed((a,), crew(2), ModelConfig("a", replicas_max=1), failing={(SHARED, a): {"w0", "w1"}})
    assert holders(alone, a) == {chosen}
