"""Session tokens: only a gateway's word counts, and only for what it said."""

from __future__ import annotations

import base64

import msgspec
import pytest

from tether.crypto import (
    SESSION_DOMAIN,
    Identity,
    Keyset,
    Role,
    Session,
    Signer,
    Verifier,
    issue_session,
    new_identity,
    open_session,
)
from tether.errors import BadEncoding, BadSignature, EnvelopeError, RoleNotAllowed, UnknownKey, Unsigned
from tether.wire import codec

NOW = 1_700_000_000_000
SESSION = Session("0011223344556677", "abcdefgh", "acme", ("infer",), ("plus", "a-*"), 1.7e9, 1.7e9 + 900)


def signer(identity: Identity) -> Signer:
    return Signer(identity, lambda: NOW)


def verifier(*identities: Identity) -> Verifier:
    records = tuple(identity.record(not_before=0, expires_at=NOW * 2) for identity in identities)
    return Verifier(Keyset(1, 0, NOW * 2, records), lambda: NOW)


@pytest.fixture
def gateway() -> Identity:
    return new_identity("gateway", Role.GATEWAY)


def test_what_one_gateway_issued_another_opens(gateway: Identity) -> None:
    text = issue_session(signer(gateway), SESSION)
    assert text.startswith("ts_")
    assert open_session(verifier(gateway), text) == SESSION


def test_the_form_is_as_documented() -> None:
    """A vector for other languages: Ed25519 is deterministic."""
    identity = Identity("gateway", Role.GATEWAY, bytes(32), bytes(32))
    text = issue_session(signer(identity), SESSION)
    assert text == (
        "ts_E545QOZLVJFyIIjZoNdBYpewMDAxMTIyMzM0NDU1NjY3N6hhYmNkZWZnaKRhY21lkaVpbmZlcpKkcGx1c6NhLSrLQdlU_EAAAADLQdlU"
        "_SEAAAA.deicggJ_bEaSOW8S9nWX2rfHw-IzyWhXGFreEcGMwW93lX-BXqFHgffqMfYG3O8wX0DVaLeNymtPf1w3a73ACQ"
    )
    payload = base64.urlsafe_b64decode(text.removeprefix("ts_").partition(".")[0] + "==")
    assert payload[:16] == identity.kid
    assert codec.unpack(payload[16:])[:4] == ("0011223344556677", "abcdefgh", "acme", ("infer",))


def test_every_changed_character_is_noticed(gateway: Identity) -> None:
    """But for the last of each part, whose spare bits base64 does not carry."""
    text = issue_session(signer(gateway), SESSION)
    checked = verifier(gateway)
    ends = {text.index(".") - 1, len(text) - 1}
    for place in range(len(text)):
        if place in ends:
            continue
        other = "A" if text[place] != "A" else "B"
        with pytest.raises(EnvelopeError):
            open_session(checked, text[:place] + other + text[place + 1 :])


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.GATEWAY])
def test_only_gateways_issue_sessions(role: Role) -> None:
    other = new_identity("other", role)
    with pytest.raises(RoleNotAllowed):
        open_session(verifier(other), issue_session(signer(other), SESSION))


def test_a_gateway_that_the_keyset_does_not_name_issues_none(gateway: Identity) -> None:
    with pytest.raises(UnknownKey):
        open_session(verifier(new_identity("gateway", Role.GATEWAY)), issue_session(signer(gateway), SESSION))


def test_a_signature_of_another_domain_does_not_count(gateway: Identity) -> None:
    body = codec.pack(msgspec.to_builtins(SESSION))
    other = signer(gateway).sign_statement(b"tether/other/v1\0", body)
    mine = signer(gateway).sign_statement(SESSION_DOMAIN, body)
    head = base64.urlsafe_b64encode(gateway.kid + body).rstrip(b"=").decode()
    for signature, counts in ((other, False), (mine, True)):
        text = f"ts_{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
        if counts:
            assert open_session(verifier(gateway), text) == SESSION
        else:
            with pytest.raises(BadSignature):
                open_session(verifier(gateway), text)


@pytest.mark.parametrize("text", ["", "ts_", "ts_.", "ts_!.!", "ts_AAAA.AAAA", "tk_AAAA", "ts_" + "A" * 9000, "ts_ä.ä"])
def test_what_is_no_token_is_refused(gateway: Identity, text: str) -> None:
    with pytest.raises((Unsigned, BadEncoding, UnknownKey)):
        open_session(verifier(gateway), text)


def test_a_signed_body_of_another_form_is_refused(gateway: Identity) -> None:
    body = codec.pack(["only", "two"])
    parts = (gateway.kid + body, signer(gateway).sign_statement(SESSION_DOMAIN, body))
    text = "ts_" + ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    with pytest.raises(BadEncoding):
        open_session(verifier(gateway), text)


def test_a_session_that_fits_no_header_is_not_issued(gateway: Identity) -> None:
    large = msgspec.structs.replace(SESSION, models=tuple(f"{number:060}" for number in range(100)))
    with pytest.raises(BadEncoding, match="characters"):
        issue_session(signer(gateway), large)
