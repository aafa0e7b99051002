"""Configurations of models: what is accepted, and which field a refusal names."""

from __future__ import annotations

from typing import Any

import pytest

from tether.errors import InvalidRequest
from tether.model.config import ModelConfig, QueuePolicy, Shadow, VersionPolicy, Warmup, check_config, default_config
from tether.wire import codec


def test_the_default_configuration_is_accepted() -> None:
    assert check_config(default_config("digits")) == ModelConfig("digits")


def test_a_configuration_survives_its_encoding() -> None:
    config = ModelConfig(
        "digits",
        revision=3,
        max_batch_size=8,
        preferred_batch_sizes=(4, 8),
        queue=QueuePolicy(max_size=10, timeout_ms=50),
        warmup=(Warmup(rows=2, count=3, shapes={"x": (4,)}, random=True),),
        versions=VersionPolicy(specific=(1, 3)),
        labels={"disk": "ssd"},
        shadows=(Shadow(2, 10.0),),
    )
    assert codec.decode(codec.encode(config), ModelConfig) == check_config(config)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("max_batch_size", {"max_batch_size": -1}),
        ("max_delay_ms", {"max_delay_ms": float("nan")}),
        ("preferred_batch_sizes", {"max_batch_size": 4, "preferred_batch_sizes": (8,)}),
        ("queue.max_size", {"queue": QueuePolicy(max_size=-1)}),
        ("queue.timeout_ms", {"queue": QueuePolicy(timeout_ms=float("inf"))}),
        ("instances", {"instances": 0}),
        ("threads", {"threads": 257}),
        ("isolation", {"isolation": "jail"}),
        ("default_priority", {"default_priority": "urgent"}),
        ("warmup", {"warmup": (Warmup(),) * 17}),
        ("warmup[0].rows", {"warmup": (Warmup(rows=0),)}),
        ("warmup[0].shapes.x", {"warmup": (Warmup(shapes={"x": (0,)}),)}),
        ("idle_unload_s", {"idle_unload_s": -1.0}),
        ("replicas_min", {"replicas_min": 3, "replicas_max": 2}),
        ("versions", {"versions": VersionPolicy(latest=2, specific=(1,))}),
        ("versions.specific", {"versions": VersionPolicy(specific=(0,))}),
        ("labels", {"labels": {"": "x"}}),
        ("labels", {"labels": {"zone": "a\nb"}}),
        ("shadows[0].percent", {"shadows": (Shadow(1, 101.0),)}),
        ("cache_ttl_s", {"cache_ttl_s": -0.5}),
    ],
)
def test_a_refusal_names_its_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_config(ModelConfig("digits", **changes))
    assert refused.value.field == field
