"""Which versions are served, and which workers are told to hold: as the configuration of a model says."""

from __future__ import annotations

from tether.dispatcher import serving_policy
from tether.dispatcher.serving_policy import LINGER_S, RecentlyServed, served
from tether.domain.job import SHARED
from tether.domain.manifest import Alias, ModelRef, Route, Share
from tether.model.config import ModelConfig, Shadow, VersionPolicy
from tether.model.version_policy import served_versions


def test_without_a_policy_every_version_is_served_and_of_an_unloaded_model_none() -> None:
    alias = Alias("m", "production", 1)
    assert served_versions(ModelConfig("m"), [1, 2, 3], [alias]) == {1, 2, 3}
    assert served_versions(ModelConfig("m", loaded=False), [1, 2, 3], [alias], [1, 2, 3]) == frozenset()


def test_the_latest_so_many_are_served_and_those_that_an_alias_stands_for() -> None:
    config = ModelConfig("m", versions=VersionPolicy(latest=2))
    split = Alias("m", "canary", 2, split=(Share(2, 90), Share(1, 10)))
    assert served_versions(config, [1, 2, 3, 10]) == {3, 10}
    assert served_versions(config, [1, 2, 3, 10], [split]) == {1, 2, 3, 10}
    assert served_versions(config, [1, 2, 3, 10], [Alias("m", "latest", 1)]) == {3, 10}


def test_what_is_held_stays_until_newer_versions_are_held() -> None:
    config = ModelConfig("m", versions=VersionPolicy(latest=1))
    assert served_versions(config, [1, 2], (), [1]) == {1, 2}
    assert served_versions(config, [1, 2], (), [1, 2]) == {2}
    assert served_versions(config, [1, 2, 3], (), [1]) == {1, 3}


def test_specific_versions_are_served_as_far_as_there_are_any_and_so_are_shadows() -> None:
    config = ModelConfig("m", versions=VersionPolicy(specific=(1, 9)), shadows=(Shadow(3),))
    assert served_versions(config, [1, 2, 3], (), [2]) == {1, 3}


A1, A2, B1 = ModelRef("a", 1), ModelRef("a", 2), ModelRef("b", 1)


def test_workers_hold_what_is_served_in_their_own_pool() -> None:
    models = {SHARED: (A1, A2, B1), "acme": (A1, A2)}
    configs = {"a": ModelConfig("a", versions=VersionPolicy(latest=1)), "b": ModelConfig("b", loaded=False)}
    routes = {
        (SHARED, A1): Route("a", 1, ("one",)),
        (SHARED, A2): Route("a", 2, ("one",)),
        ("acme", A1): Route("a", 1, ("own",), pool="acme"),
        ("acme", A2): Route("a", 2, (), pool="acme"),
    }
    assert served(models, configs, {}, routes) == {SHARED: (A2,), "acme": (A1, A2)}
    aliases = {"a": [Alias("a", "production", 1)]}
    assert serving_policy.served(models, configs, aliases, routes) == {SHARED: (A1, A2), "acme": (A1, A2)}


def test_what_is_not_wanted_any_more_lingers_unless_it_is_deleted() -> None:
    wanted, models = RecentlyServed(), {SHARED: (A1, A2, B1)}
    assert wanted.lingering({SHARED: (A1, B1)}, models, 10.0) == {SHARED: (A1, B1)}
    assert wanted.lingering({SHARED: (A2,)}, models, 10.0 + LINGER_S / 2) == models
    assert wanted.lingering({SHARED: (A2,)}, {SHARED: (A2, B1)}, 10.1 + LINGER_S / 2) == {SHARED: (A2, B1)}
    assert wanted.lingering({SHARED: (A2,)}, models, 10.0 + LINGER_S) == {SHARED: (A2,)}
