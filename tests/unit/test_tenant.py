"""Tenants: names and model patterns."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import BadName, InvalidRequest
from tether.tenant import Tenant, allows_model, check_patterns, check_tenant_name

names = st.text("ab-._", min_size=1, max_size=12).map(lambda text: f"a{text}")
patterns = st.text("ab-._*", min_size=1, max_size=8).map(lambda text: f"a{text}".replace("**", "*"))


@given(patterns, names)
def test_a_star_stands_for_any_run_of_characters(pattern: str, name: str) -> None:
    assert allows_model((pattern,), name) == fnmatchcase(name, pattern)


def test_one_matching_pattern_of_several_is_enough() -> None:
    assert allows_model(("digits", "face-*"), "face-small")
    assert not allows_model(("digits", "face-*"), "surface-x")
    assert not allows_model((), "digits")


@pytest.mark.parametrize("bad", ["", "../x", "a b", "A*", "a\n", "*a*a*a*a*", "a" * 65, "ä"])
def test_what_no_model_could_be_named_is_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="models"):
        check_patterns((bad,))


def test_the_costliest_pattern_is_matched_in_no_time() -> None:
    check_patterns(("*a*a*a*",))
    began = time.process_time()
    assert not allows_model(("*a*a*a*b",), "a" * 64)
    assert time.process_time() - began < 0.5


def test_an_isolated_tenant_has_a_scope_of_its_own() -> None:
    assert Tenant("acme").scope == Tenant("other").scope == "shared"
    assert Tenant("acme", isolated=True).scope == "acme"
    with pytest.raises(BadName, match="reserved"):
        check_tenant_name("shared")
