"""Tenants: names and model patterns."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.tenant import Tenant, allows_model, allows_patterns, check_patterns, check_tenant_name
from tether.errors import BadName, InvalidRequest

names = st.text("ab-._", min_size=1, max_size=12).map(lambda text: f"a{text}")
patterns = st.text("ab-._*", min_size=1, max_size=8).map(lambda text: f"a{text}".replace("**", "*"))


@given(patterns, names)
def test_a_star_stands_for_any_run_of_characters(pattern: str, name: str) -> None:
    assert allows_model((pattern,), name) == fnmatchcase(name, pattern)


def test_a_pattern_without_a_tenant_is_about_the_keys_own_models_and_the_plain_ones() -> None:
    assert allows_model(("res*",), "resnet", "acme")
    assert allows_model(("res*",), "acme/resnet", "acme")
    for other in ("research/resnet", "resnet/acme", "beta/resnet"):
        assert not allows_model(("res*", "*net", "r*t", "*a*e*"), other, "acme"), other
    assert not allows_model(("acme*", "acme.*", "a*"), "acme/resnet", "beta")


def test_a_pattern_with_a_tenant_is_about_its_namespace_alone() -> None:
    for tenant in ("acme", "beta", "default"):
        assert allows_model(("beta/*",), "beta/resnet", tenant)
        assert allows_model(("default/res*",), "resnet", tenant)
        assert not allows_model(("beta/*", "default/*"), "beta.x/resnet", tenant)
        assert not allows_model(("default/*",), "acme/resnet", tenant)
        assert allows_model(("*/resnet",), "acme/resnet", tenant)
        assert not allows_model(("*/resnet",), "acme/resnet2", tenant)
    assert not allows_model(("beta/*",), "acme/resnet", "acme")


def test_a_star_alone_is_about_every_model() -> None:
    for name in ("resnet", "acme/resnet", "beta/resnet"):
        assert allows_model(("*",), name, "acme")
        assert allows_model(("x", "*"), name, "acme")


def test_patterns_that_go_no_further_than_others() -> None:
    def within(patterns: str, tenant: str, others: str, other: str) -> bool:
        return allows_patterns((patterns,), tenant, (others,), other)

    assert within("*", "default", "*", "acme")
    assert within("*", "default", "res*", "acme")
    assert within("res*", "default", "res*", "default")
    assert within("res*", "default", "default/resnet", "acme")
    assert not within("res*", "default", "resnet", "acme"), "it would be about acme/resnet too"
    assert not within("res*", "default", "*", "default")
    assert not within("*/res*", "default", "*", "default")
    assert within("*/res*", "default", "res*", "acme")
    assert not within("acme/*", "default", "*/x", "acme")


def test_one_matching_pattern_of_several_is_enough() -> None:
    assert allows_model(("digits", "face-*"), "face-small")
    assert not allows_model(("digits", "face-*"), "surface-x")
    assert not allows_model((), "digits")


@pytest.mark.parametrize(
    "bad", ["", "../x", "a b", "A*", "a\n", "*a*a*a*a*", "a" * 65, "ä", "a/b/c", "/a", "a/", "a//b", "a/B", "a/.."]
)
def test_what_no_model_could_be_named_is_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="models"):
        check_patterns((bad,))


def test_the_costliest_pattern_is_matched_in_no_time() -> None:
    check_patterns(("*a*a*a*",))
    began = time.process_time()
    assert not allows_model(("*a*a*a*b",), "a" * 64)
    assert time.process_time() - began < 0.5


def test_an_isolated_tenant_has_a_pool_of_its_own() -> None:
    assert Tenant("acme").pool == Tenant("other").pool == "shared"
    assert Tenant("acme", isolated=True).pool == "acme"
    with pytest.raises(BadName, match="reserved"):
        check_tenant_name("shared")
