"""A keyset that changes while frames arrive: who counts from when on."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import nacl.signing
import pytest

from tether import crypto
from tether.crypto import Envelope, Keyset, MessageType, Revocation, Role, Signer, Verifier
from tether.errors import EnvelopeError, KeyExpired, KeyRevoked, Replayed, UnknownKey

NOW = 1_800_000_000_000
DAY = 86_400_000
OLD = crypto.new_identity("gateway", Role.GATEWAY)
NEW = crypto.new_identity("gateway", Role.GATEWAY)
WORKER = crypto.new_identity("worker-1", Role.WORKER)


@dataclasses.dataclass
class Clock:
    now: int = NOW

    def __call__(self) -> int:
        return self.now


def keyset(*identities: crypto.Identity, version: int = 1, **changes: Any) -> Keyset:
    records = tuple(who.record(not_before=NOW, expires_at=NOW + DAY) for who in identities)
    return msgspec.structs.replace(Keyset(version, NOW, NOW + 10 * DAY, records), **changes)


def frame(who: crypto.Identity = OLD, at: int = NOW) -> bytes:
    return Signer(who, lambda: at).sign_envelope(MessageType.INFER, "s", b"body")


def opened(verifier: Verifier, data: bytes, **more: Any) -> Envelope:
    return verifier.verify_envelope(data, subject="s", types=(MessageType.INFER,), **more)


def refused(verifier: Verifier, data: bytes, **more: Any) -> type[EnvelopeError]:
    with pytest.raises(EnvelopeError) as caught:
        opened(verifier, data, **more)
    assert "\n" not in caught.value.message
    return type(caught.value)


def test_who_counts_is_what_the_newest_keyset_says() -> None:
    verifier = Verifier(keyset(OLD), Clock())
    assert refused(verifier, frame(NEW)) is UnknownKey
    verifier.replace(both := keyset(OLD, NEW, version=2))
    assert verifier.keyset is both
    assert opened(verifier, frame(OLD)).sender == opened(verifier, frame(NEW)).sender == "gateway"
    verifier.replace(keyset(NEW, version=3))
    assert refused(verifier, frame(OLD)) is UnknownKey


def test_unknown_expired_and_revoked_keys_each_have_their_own_reason() -> None:
    verifier = Verifier(keyset(OLD, revoked=(Revocation(NEW.kid, "gateway", NOW),)), clock := Clock())
    assert refused(verifier, frame(WORKER)) is UnknownKey
    assert refused(verifier, frame(NEW)) is KeyRevoked
    clock.now = NOW + DAY
    assert refused(verifier, frame(OLD)) is KeyExpired


def test_a_key_that_is_both_listed_and_revoked_does_not_count() -> None:
    verifier = Verifier(keyset(OLD, revoked=(Revocation(OLD.kid, "gateway", NOW),)), Clock())
    assert refused(verifier, frame()) is KeyRevoked
    assert refused(verifier, frame(), stored=True) is KeyRevoked


def test_an_expired_keyset_vouches_for_nobody() -> None:
    verifier = Verifier(keyset(OLD, expires_at=NOW + 100), clock := Clock())
    assert opened(verifier, frame())
    clock.now = NOW + 100
    assert refused(verifier, frame()) is KeyExpired
    assert refused(verifier, frame(), stored=True) is KeyExpired
    verifier.replace(keyset(OLD, version=2))
    assert opened(verifier, frame())


def test_what_was_stored_outlives_its_key_and_nothing_is_signed_after_it() -> None:
    verifier = Verifier(keyset(OLD), clock := Clock())
    clock.now = NOW + 2 * DAY
    assert refused(verifier, frame()) is KeyExpired
    assert opened(verifier, frame(), stored=True)
    assert opened(verifier, frame(at=NOW + DAY - 1), stored=True)
    assert refused(verifier, frame(at=NOW + DAY), stored=True) is KeyExpired


def test_keys_that_stay_are_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(keyset(OLD), Clock())
    both, fresh = keyset(OLD, NEW, version=2), NEW.record(not_before=0, expires_at=0)
    built: list[bytes] = []

    class Counted(nacl.signing.VerifyKey):
        def __init__(self, key: bytes) -> None:
            built.append(key)
            super().__init__(key)

    monkeypatch.setattr(nacl.signing, "VerifyKey", Counted)
    verifier.replace(both)
    assert built == [fresh.ed25519]


def test_a_replay_stays_one_whatever_the_keyset() -> None:
    verifier = Verifier(keyset(OLD), Clock())
    data = frame()
    opened(verifier, data, once=True)
    verifier.replace(keyset(OLD, NEW, version=2))
    with pytest.raises(Replayed):
        opened(verifier, data, once=True)


def test_a_signer_changes_its_key_and_not_its_name() -> None:
    signer = Signer(OLD, lambda: NOW)
    signer.replace(NEW)
    verifier = Verifier(keyset(NEW), Clock())
    assert signer.kid == NEW.kid
    assert opened(verifier, signer.sign_envelope(MessageType.INFER, "s", b"")).sender == "gateway"
    with pytest.raises(ValueError, match="worker-1"):
        signer.replace(WORKER)
    signer.retire()
    with pytest.raises(KeyRevoked):
        signer.sign_envelope(MessageType.INFER, "s", b"")
