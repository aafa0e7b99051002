"""Owners and grants: who may do what, and what follows for models from before they had owners."""

from __future__ import annotations

import msgspec
import pytest

from tether.bus.key_value.model_owners import OwnerBook
from tether.domain.manifest import Batching, Manifest
from tether.errors import BadEncoding, BadName, Conflict, Forbidden, InvalidRequest, ModelNotFound
from tether.model.config import ModelConfig
from tether.model.ownership import (
    DEFAULT_TENANT,
    EVERYBODY,
    MOST_GRANTS,
    Asker,
    Ownership,
    Right,
    first_ownership,
    granted,
    handed_over,
    implied_ownership,
    owned_model,
    owner_key,
    push_refusal,
    refusal,
)
from tether.wire import codec


def manifest(version: int, *, tenant: str = "", owner: str = "", name: str = "m") -> Manifest:
    return Manifest(name, version, "onnxruntime_onnx", (), (), (), Batching(), 0.0, "key:x", tenant, owner=owner)


def test_each_right_includes_those_before_it() -> None:
    found = Ownership("m", "acme", uses=("reader",), writes=("writer",))
    rights = {tenant: found.right(tenant) for tenant in ("acme", "writer", "reader", "other", "")}
    assert rights == {
        "acme": Right.OWN,
        "writer": Right.WRITE,
        "reader": Right.USE,
        "other": Right.NONE,
        "": Right.NONE,
    }
    shared = granted(found, EVERYBODY, Right.USE)
    assert [shared.right(tenant) for tenant in ("writer", "reader", "other")] == [Right.WRITE, Right.USE, Right.USE]


def test_the_first_push_makes_the_owner_and_only_the_default_tenant_shares() -> None:
    assert first_ownership("m", "acme").right("other") is Right.NONE
    assert first_ownership("m", DEFAULT_TENANT).right("other") is Right.USE


def test_a_model_from_before_there_were_owners_belongs_to_who_pushed_its_oldest_version() -> None:
    found = implied_ownership([manifest(3, tenant="other"), manifest(2, tenant="acme")])
    assert found == Ownership("m", "acme", uses=(EVERYBODY,))
    assert implied_ownership([manifest(1)]) == Ownership("m", DEFAULT_TENANT, uses=(EVERYBODY,))
    assert implied_ownership([]) is None


def test_a_version_that_names_its_owner_is_not_open_to_everybody_before_the_record_is_heard_of() -> None:
    assert implied_ownership([manifest(1, tenant="acme", owner="acme")]) == Ownership("m", "acme")
    pushed_by_an_administrator = manifest(2, tenant=DEFAULT_TENANT, owner="acme")
    assert implied_ownership([pushed_by_an_administrator]) == Ownership("m", "acme")


def test_a_grant_replaces_the_one_before_and_can_be_taken_back() -> None:
    found = granted(Ownership("m", "acme"), "b", Right.WRITE)
    assert (found.uses, found.writes) == ((), ("b",))
    found = granted(found, "b", Right.USE)
    assert (found.uses, found.writes) == (("b",), ())
    assert granted(found, "b", Right.NONE) == Ownership("m", "acme")
    assert granted(found, "c", Right.NONE) == found


@pytest.mark.parametrize(
    ("tenant", "right", "error"),
    [
        (EVERYBODY, Right.WRITE, InvalidRequest),
        ("acme", Right.USE, InvalidRequest),
        ("no tenant", Right.USE, BadName),
        ("shared", Right.USE, BadName),
        ("", Right.USE, BadName),
    ],
)
def test_what_cannot_be_granted(tenant: str, right: Right, error: type[Exception]) -> None:
    with pytest.raises(error):
        granted(Ownership("m", "acme"), tenant, right)


def test_grants_are_bounded() -> None:
    full = Ownership("m", "acme", uses=tuple(f"t{number}" for number in range(MOST_GRANTS)))
    with pytest.raises(InvalidRequest, match="at most"):
        granted(full, "one-more", Right.USE)
    assert granted(full, "t1", Right.WRITE).right("t1") is Right.WRITE


def test_who_was_the_owner_keeps_only_what_all_have() -> None:
    before = Ownership("m", "acme", uses=(EVERYBODY,), writes=("b",))
    after = handed_over(before, "b")
    assert (after.tenant, after.writes, after.right("acme")) == ("b", (), Right.USE)
    with pytest.raises(BadName):
        handed_over(before, EVERYBODY)


def test_a_refusal_tells_a_stranger_nothing_and_a_user_what_to_ask_for() -> None:
    stranger, user = refusal("m", Right.NONE, Right.WRITE), refusal("m", Right.USE, Right.WRITE)
    assert isinstance(stranger, ModelNotFound)
    assert stranger.hidden
    assert isinstance(user, Forbidden)
    assert "model grant m" in user.message
    assert refusal("m", Right.WRITE, Right.WRITE) is None
    assert isinstance(refusal("m", Right.WRITE, Right.OWN), Forbidden)
    asker = Asker(DEFAULT_TENANT)
    taken = push_refusal("m", Right.NONE, asker)
    assert isinstance(taken, Conflict)
    assert taken.hidden
    assert isinstance(push_refusal("m", Right.USE, asker), Forbidden)
    assert push_refusal("m", Right.WRITE, asker) is None


@pytest.mark.parametrize("name", ["m", "beta/m"])
def test_a_push_into_another_namespace_is_refused_in_the_same_words_whether_there_is_a_model_or_not(name: str) -> None:
    absent, hidden = (push_refusal(name, found, Asker("acme")) for found in (None, Right.NONE))
    assert isinstance(absent, Forbidden)
    assert isinstance(hidden, Forbidden)
    assert absent.message == hidden.message
    assert (absent.hidden, hidden.hidden) == (False, True)
    assert push_refusal(name, None, Asker("acme", admin=True)) is None
    assert push_refusal(name, Right.WRITE, Asker("acme")) is None


def test_a_tenant_makes_models_in_its_own_namespace() -> None:
    assert push_refusal("acme/m", None, Asker("acme")) is None
    assert push_refusal("m", None, Asker(DEFAULT_TENANT)) is None
    assert isinstance(push_refusal("acme/m", Right.NONE, Asker("acme")), Conflict)
    with pytest.raises(BadName, match="a word of the HTTP interface"):
        push_refusal("acme/ready", None, Asker("acme"))
    assert push_refusal("ready", None, Asker(DEFAULT_TENANT)) is None


def test_no_key_of_a_configuration_is_taken_for_that_of_an_owner() -> None:
    for name in ("m", "a.b", "m.owner", "owner"):
        assert owned_model(owner_key(name)) == name
    assert owned_model("m=owner") is None


def test_no_reader_of_configurations_takes_an_owner_for_one() -> None:
    with pytest.raises(BadEncoding):
        codec.decode(codec.encode(Ownership("m", "acme")), ModelConfig)


def test_a_service_goes_by_the_record_then_by_the_versions_then_by_nothing() -> None:
    book = OwnerBook()
    assert book.right("m", "b") is Right.OWN, "nobody has a model of this name"
    book.manifest(manifest(1, tenant="acme"))
    assert book.right("m", "b") is Right.USE
    assert book.config_changed(owner_key("m"), codec.encode(Ownership("m", "acme")))
    assert book.right("m", "b") is Right.NONE
    book.gone("m", 1)
    assert book.right("m", "b") is Right.NONE, "the name stays with its owner"
    assert book.config_changed(owner_key("m"), None)
    assert book.right("m", "b") is Right.OWN
    assert not book.config_changed("m", b"")


def test_a_record_that_cannot_be_believed_leaves_the_model_to_administrators() -> None:
    book = OwnerBook()
    book.manifest(manifest(1, tenant="acme"))
    book.refused("m")
    assert book.right("m", "b") is Right.USE, "that was a configuration"
    book.refused(owner_key("m"))
    assert [book.right("m", tenant) for tenant in ("acme", "b")] == [Right.NONE, Right.NONE]
    record = Ownership("m", "acme", uses=("b",))
    book.config_changed(owner_key("m"), codec.encode(record))
    book.refused(owner_key("m"))
    assert book.right("m", "b") is Right.USE, "the record before stays in force"
    book.config_changed(owner_key("other"), codec.encode(msgspec.structs.replace(record, owned="m")))
    assert book.of("other") is None, "a record counts only under its own key"
