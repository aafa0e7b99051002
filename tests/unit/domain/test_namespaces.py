"""Names of models in namespaces: what a caller means, and how it is told."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.job import SHARED, Lane, LaneKind
from tether.domain.manifest import NAME_PATTERN, check_name
from tether.domain.model_names import (
    DEFAULT_TENANT,
    LONGEST,
    RESERVED,
    check_new_name,
    check_platform_name,
    namespace,
    platform_name,
    resolved,
    resolved_push,
    shown,
    shown_text,
)
from tether.errors import BadName
from tether.gateway_http.api import route_table
from tether.wire.subjects import Names, name_of, token

parts = (
    st.from_regex(NAME_PATTERN, fullmatch=True).map(str.strip).filter(lambda name: len(name) <= 32 and name != SHARED)
)
tenants = st.just(DEFAULT_TENANT) | parts
platform_names = st.builds(platform_name, tenants, parts)


def nobody(_name: str) -> bool:
    return False


@given(parts)
def test_the_default_tenant_sees_plain_names_only_as_they_are(name: str) -> None:
    for known in (nobody, {f"default/{name}", name}.__contains__):
        assert resolved(name, DEFAULT_TENANT, known) == name
        assert resolved_push(name, DEFAULT_TENANT, known, known) == name
        assert shown(name, DEFAULT_TENANT, known) == name
    assert platform_name(DEFAULT_TENANT, name) == name
    assert namespace(name) == DEFAULT_TENANT


@given(platform_names, tenants, st.frozensets(platform_names, max_size=8))
def test_what_is_shown_is_what_can_be_written(name: str, tenant: str, others: frozenset[str]) -> None:
    known = (others | {name}).__contains__
    assert resolved(shown(name, tenant, known), tenant, known) == name


@given(parts, parts, st.frozensets(platform_names, max_size=8))
def test_another_tenants_model_is_meant_only_where_it_is_said(name: str, tenant: str, others: frozenset[str]) -> None:
    for known in (others.__contains__, lambda _: True):
        assert namespace(resolved(name, tenant, known)) in (DEFAULT_TENANT, tenant)
        assert namespace(resolved_push(name, tenant, known, known)) in (DEFAULT_TENANT, tenant)


def test_a_plain_name_is_the_tenants_own_first_and_then_the_plain_one() -> None:
    assert resolved("m", "acme", {"m", "acme/m"}.__contains__) == "acme/m"
    assert resolved("m", "acme", {"m", "beta/m"}.__contains__) == "m"
    assert resolved("default/m", "acme", {"m", "acme/m"}.__contains__) == "m"
    assert resolved("beta/m", "acme", nobody) == "beta/m"
    assert shown("m", "acme", {"m", "acme/m"}.__contains__) == "default/m"
    assert shown("beta/m", "acme", nobody) == "beta/m"
    assert shown("acme/m", "acme", nobody) == "m"


def test_a_push_goes_to_the_tenants_own_unless_it_may_write_to_the_plain_one() -> None:
    plain, own = {"m"}.__contains__, {"m", "acme/m"}.__contains__
    assert resolved_push("m", "acme", nobody, nobody) == "acme/m"
    assert resolved_push("m", "acme", plain, nobody) == "acme/m"
    assert resolved_push("m", "acme", plain, plain) == "m"
    assert resolved_push("m", "acme", own, own) == "acme/m"
    assert resolved_push("default/m", "acme", own, own) == "m"
    assert resolved_push("beta/m", "acme", own, own) == "beta/m"


@pytest.mark.parametrize(
    "written",
    ["/m", "acme/", "/", "//", "acme//m", "acme/m/", "/acme/m", "a/b/c", "default/a/b", "default//m", "default/", "default/../m",
     "../m", "acme/..", "acme/../m", "./m", "Acme/m", "acme/M", "acme/m\0", "acme\0/m", "acme/m\n", "acme /m", "acme%2Fm/x",
     "acme/%2e%2e", "acme/m%2f", "ac\u0441me/m", "acme\\m/x", "shared/m", "*/m", "acme/*", "acme~m/x",
     "a" * 64 + "/" + "b" * 64, "a" * 65 + "/m"],
)  # fmt: skip
def test_no_other_spelling_is_a_name(written: str) -> None:
    for tenant in (DEFAULT_TENANT, "acme"):
        with pytest.raises(BadName):
            resolved(written, tenant, lambda _: True)


@pytest.mark.parametrize(
    "name", ["default/m", "shared/m", "a/b/c", "acme/", "/m", "acme/M", "a" * 50 + "/" + "b" * 50, "M"]
)
def test_what_is_no_name_of_the_platform(name: str) -> None:
    with pytest.raises(BadName):
        check_platform_name(name, field="name")


def test_the_longest_name_has_a_consumer_that_the_broker_takes() -> None:
    longest = "a" * 64 + "/" + "b" * (LONGEST - 65)
    assert check_platform_name(longest, field="name") == longest
    lane = Lane(LaneKind.JOB, longest, 999_999_999, "r" * 64, "s" * 64)
    assert len(Names().lane_consumer(lane)) <= 255


@given(platform_names)
def test_a_name_is_one_token_and_comes_back(name: str) -> None:
    assert re.fullmatch(r"[-/_=a-z0-9]+", token(name)), "what a key of a bucket may be made of"
    assert name_of(token(name)) == name
    lane = Lane(LaneKind.INFER, name, 1, "local")
    assert Names().parse_lane_consumer(Names().lane_consumer(lane)) == lane
    assert not re.search(r"[.*>/\\\s]", Names().lane_consumer(lane))


@given(parts)
def test_no_plain_name_imitates_a_tenants(name: str) -> None:
    assert check_name(name, field="name") == name
    assert not set("/~") & set(name)


def test_a_message_tells_a_tenant_its_own_models_as_it_writes_them() -> None:
    told = "model 'acme/m' has no version 3; file 'acme/x' of model 'beta/acme/m'"
    assert shown_text(told, "acme") == "model 'm' has no version 3; file 'acme/x' of model 'beta/acme/m'"
    assert shown_text(told, DEFAULT_TENANT) == told


def test_every_word_after_a_model_in_a_path_is_no_models_name() -> None:
    words = [re.search(r"\{(?:name|model)\}/([^/{]+)", row.path) for row in route_table.table()]
    found = {word[1] for word in words if word is not None}
    assert {word for word in found if ":" not in word} <= RESERVED
    for word in RESERVED:
        with pytest.raises(BadName):
            check_new_name(f"acme/{word}", field="name")
        check_new_name(word, field="name")
