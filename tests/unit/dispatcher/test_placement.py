"""Which worker holds what: a worker bound to an isolated tenant what that tenant may use, and the others the rest."""

from __future__ import annotations

import msgspec

from tether.dispatcher import assignments
from tether.dispatcher.assignments import LaneGroup, LastHeartbeat
from tether.domain.job import SHARED
from tether.domain.manifest import Assignment, Heartbeat, ModelRef, Route
from tether.domain.worker_protocol import EndedLanes

A, B = ModelRef("a", 1), ModelRef("b", 2)
MODELS = {SHARED: (A, B), "acme": (B,)}
BOUND = {"own": "acme", "lost": "gone", "one": SHARED}


def beat(worker: str, pool: str, *ready: ModelRef, region: str = "local") -> Heartbeat:
    return Heartbeat(worker, 1, region, ready, (), 0, 2, 1.0, pool)


def test_a_worker_is_told_what_it_holds_for_the_epoch_and_the_pool_that_it_has() -> None:
    epochs = {"own": 1, "lost": 2, "one": 3, "silent": 4}
    held = {"own": (B,), "lost": (), "one": (A, B)}
    found = assignments.assignments(epochs, BOUND, held, revisions={"b": 7, "c": 1})
    assert found == {
        "own": Assignment("own", 1, (B,), "acme", revisions=(("b", 7),)),
        "lost": Assignment("lost", 2, (), "gone"),
        "one": Assignment("one", 3, (A, B), SHARED, revisions=(("b", 7),)),
    }


def test_a_route_names_the_workers_of_its_pool_that_hold_the_version() -> None:
    living = {
        "own": beat("own", "acme", A, B, region="edge"),
        "one": beat("one", SHARED, A, B),
        "new": beat("new", SHARED, B),
        "liar": beat("liar", "acme", B),
        "stale": beat("stale", SHARED, B),
    }
    found = assignments.routes(living, {**BOUND, "stale": "acme"}, MODELS, {(SHARED, B): "why"})
    assert found == {
        (SHARED, A): Route("a", 1, ("one",), ("local",), SHARED),
        (SHARED, B): Route("b", 2, ("new", "one"), ("local",), SHARED, "why"),
        ("acme", B): Route("b", 2, ("own",), ("edge",), "acme"),
    }


def test_a_route_has_the_time_that_its_slowest_worker_takes_for_a_job_and_keeps_it_until_that_doubles_or_halves() -> (
    None
):
    def job_s(**paces: float) -> Route:
        living = {
            name: msgspec.structs.replace(beat(name, SHARED, A), paces=((A, pace), (B, 9.0)))
            for name, pace in paces.items()
        }
        return assignments.routes(living, {}, {SHARED: (A, B)})[SHARED, A]

    first = assignments.steady(job_s(one=0.1, two=0.3), None)
    assert first.job_s == 0.3
    assert assignments.routes({"one": beat("one", SHARED, A)}, {}, {SHARED: (A, B)})[SHARED, B].job_s == 0, (
        "it has no B"
    )
    for seen, kept in ((0.5, 0.3), (0.16, 0.3), (0.6, 0.6), (0.15, 0.15)):
        assert assignments.steady(job_s(one=seen), first).job_s == kept
    silent = assignments.routes({}, {}, {SHARED: (A,)})[SHARED, A]
    assert assignments.steady(silent, first).job_s == 0.3, "known until somebody knows better"


def test_a_silent_worker_is_not_alive() -> None:
    quiet, loud = LastHeartbeat(beat("one", SHARED), 1.0), LastHeartbeat(beat("new", SHARED), 2.0)
    assert set(assignments.alive({"one": quiet, "new": loud}, 4.0, 2.5)) == {"new"}


def test_lanes_of_a_deleted_version_are_worked_off_by_one_living_worker_of_their_pool_and_then_by_another() -> None:
    living = {
        "near": beat("near", SHARED, region="edge"),
        "far": beat("far", SHARED),
        "own": beat("own", "acme"),
        "stale": beat("stale", SHARED),
    }
    pools = {**BOUND, "stale": "acme"}
    lanes = EndedLanes("a", 1, "edge")
    for turn in range(3):
        assert assignments.working_off({LaneGroup(SHARED, A, "edge"): turn}, living, pools) == {"near": (lanes,)}
        assert assignments.working_off({LaneGroup("acme", A, "edge"): turn}, living, pools) == {"own": (lanes,)}
    assert assignments.working_off({LaneGroup("gone", A, "edge"): 0}, living, pools) == {}
    many = {f"w{number}": beat(f"w{number}", SHARED) for number in range(3)}
    asked = [set(assignments.working_off({LaneGroup(SHARED, A, "edge"): turn}, many, {})) for turn in range(3)]
    assert set().union(*asked) == set(many)
    assert all(len(one) == 1 for one in asked)
    told = assignments.assignments({"own": 1, "one": 3}, BOUND, {"own": (), "one": ()}, {"one": (lanes,)})
    assert (told["own"].ended, told["one"].ended) == ((), (lanes,))
