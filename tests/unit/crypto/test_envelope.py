"""Signed envelopes: what is let in, and the one reason each other frame is kept out."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import msgspec
import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether import crypto
from tether.crypto import MessageType, Role, Signer, Verifier
from tether.errors import (
    BadEncoding,
    BadSignature,
    ClockSkew,
    EnvelopeError,
    EnvelopeExpired,
    KeyExpired,
    KeysetError,
    Replayed,
    RoleNotAllowed,
    SubjectMismatch,
    UnknownKey,
    Unsigned,
)
from tether.wire import codec

NOW = 1_800_000_000_000
YEAR = 365 * 86_400_000
GATEWAY = crypto.new_identity("gateway", Role.GATEWAY)
WORKER = crypto.new_identity("worker-1", Role.WORKER)
STRANGER = crypto.new_identity("gateway", Role.GATEWAY)
ROOT = os.urandom(32)
SUBJECT = "tether.infer.0.local.shared.m.1"
TYPES = (MessageType.INFER,)


@dataclasses.dataclass
class Clock:
    now: int = NOW

    def __call__(self) -> int:
        return self.now


def keyset(**changes: Any) -> crypto.Keyset:
    records = tuple(who.record(not_before=NOW - 1000, expires_at=NOW + YEAR) for who in (GATEWAY, WORKER))
    made = crypto.Keyset(3, NOW - 1000, NOW + YEAR, records)
    return msgspec.structs.replace(made, **changes)


def seal(body: bytes = b"body", *, who: crypto.Identity = GATEWAY, at: int = NOW, **more: Any) -> bytes:
    fields: dict[str, Any] = {"kind": MessageType.INFER, "subject": SUBJECT, **more}
    return Signer(who, lambda: at).sign_envelope(fields.pop("kind"), fields.pop("subject"), body, **fields)


def refused(kind: type[EnvelopeError], frame: bytes, *, clock: Clock | None = None, **more: Any) -> EnvelopeError:
    verifier = Verifier(keyset(), clock or Clock())
    with pytest.raises(kind) as caught:
        verifier.verify_envelope(frame, **{"subject": SUBJECT, "types": TYPES, **more})
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    return caught.value


@given(body=st.binary(max_size=100), jobs=st.lists(st.text(max_size=8), max_size=3).map(tuple))
def test_a_frame_arrives_as_it_was_signed(body: bytes, jobs: tuple[str, ...]) -> None:
    frame = seal(body, reply="tether.reply.g", jobs=jobs, message_id="m1", attempt=2, tenant="t", traceparent="00-x")
    opened = Verifier(keyset(), Clock()).verify_envelope(frame, subject=SUBJECT, types=TYPES)
    assert (opened.body, opened.sender) == (body, "gateway")
    header = opened.header
    assert (header.reply, header.jobs, header.message_id, header.attempt) == ("tether.reply.g", jobs, "m1", 2)
    assert (header.tenant, header.traceparent, header.issued_at, header.expires_at) == ("t", "00-x", NOW, 0)
    assert header.body_length == len(body)


@pytest.mark.parametrize("frame", [b"", b"TTH", b"x" * 500, codec.pack({"model": "m"}), b"tthr" + seal()[4:]])
def test_what_carries_no_signature_is_unsigned(frame: bytes) -> None:
    refused(Unsigned, frame)


def test_the_version_and_the_lengths_must_be_known() -> None:
    frame = seal(b"")
    refused(BadEncoding, frame[:4] + b"\x02" + frame[5:])
    refused(BadEncoding, frame[:5] + b"\xff\xff" + frame[7:])
    refused(BadEncoding, frame[:5] + b"\x00\x10" + frame[7:])
    refused(BadEncoding, frame[:-1])


def test_a_key_outside_the_keyset_is_unknown_whatever_name_it_claims() -> None:
    refused(UnknownKey, seal(who=STRANGER))


def test_a_changed_byte_anywhere_is_refused() -> None:
    frame = seal(b"a body of some length")
    verifier = Verifier(keyset(), Clock())
    kinds = set()
    for position in range(len(frame)):
        for flip in (0x01, 0x80):
            changed = frame[:position] + bytes([frame[position] ^ flip]) + frame[position + 1 :]
            with pytest.raises(EnvelopeError) as caught:
                verifier.verify_envelope(changed, subject=SUBJECT, types=TYPES)
            kinds.add(type(caught.value))
    assert kinds == {Unsigned, BadEncoding, UnknownKey, BadSignature}


@pytest.mark.parametrize("change", [lambda f: f + b"x", lambda f: f[:-1], lambda f: f[:-4], lambda f: f[:-4] + b"BODY"])
def test_another_body_under_the_same_header_is_refused(change: Any) -> None:
    refused(BadSignature, change(seal(b"body")))


def test_the_signature_is_for_one_purpose_only() -> None:
    frame = seal()
    length = int.from_bytes(frame[5:7], "big")
    header = frame[71 : 71 + length]
    elsewhere = nacl.signing.SigningKey(GATEWAY.seed).sign(b"another domain\0" + header).signature
    refused(BadSignature, frame[:7] + elsewhere + frame[71:])


def test_a_signed_header_that_is_no_header_is_bad_encoding() -> None:
    for fields in (b"", codec.pack(["gateway"]), codec.pack(7), b"\xc1"):
        header = GATEWAY.kid + fields
        signature = nacl.signing.SigningKey(GATEWAY.seed).sign(crypto.DOMAIN + header).signature
        refused(BadEncoding, b"TTHR\x01" + len(header).to_bytes(2, "big") + signature + header)


def test_a_frame_counts_only_where_it_was_meant_to_go() -> None:
    refused(SubjectMismatch, seal(), subject=SUBJECT + "2")
    refused(SubjectMismatch, seal(subject="tether.other"))


def test_a_role_sends_only_its_own_types() -> None:
    refused(RoleNotAllowed, seal(kind=MessageType.MANIFEST), types=(MessageType.MANIFEST,))
    refused(RoleNotAllowed, seal(who=WORKER))


def test_nobody_speaks_for_another_role() -> None:
    impostor = msgspec.structs.replace(WORKER, role=Role.GATEWAY)
    refused(RoleNotAllowed, seal(who=impostor))


def test_a_receiver_handles_only_the_types_it_named() -> None:
    refused(RoleNotAllowed, seal(kind=MessageType.JOB))


def test_every_type_has_a_sender_and_every_role_a_type() -> None:
    assert set(crypto.ROLE_TYPES) == set(Role)
    assert frozenset().union(*crypto.ROLE_TYPES.values()) == frozenset(MessageType)


def test_time_decides() -> None:
    verifier = Verifier(keyset(), clock := Clock())
    frame = seal(expires_at=NOW + 100)
    clock.now = NOW + 99
    assert verifier.verify_envelope(frame, subject=SUBJECT, types=TYPES).body == b"body"
    refused(EnvelopeExpired, frame, clock=Clock(NOW + 100))
    refused(EnvelopeExpired, seal(), clock=Clock(NOW + 501), max_age_ms=500)
    refused(ClockSkew, seal(at=NOW + crypto.MAX_SKEW_MS + 1))
    assert verifier.verify_envelope(seal(at=NOW + crypto.MAX_SKEW_MS), subject=SUBJECT, types=TYPES)


def test_what_came_at_the_wrong_time_says_who_sent_it_and_how_old_it_is() -> None:
    late = refused(EnvelopeExpired, seal(expires_at=NOW + 2000), clock=Clock(NOW + 41_000))
    assert (late.sender, late.role, late.age_s) == ("gateway", "gateway", 41.0)
    early = refused(ClockSkew, seal(at=NOW + 41_000))
    assert (early.sender, early.age_s) == ("gateway", -41.0)
    assert "'gateway' issued the message 41000 ms in the future" in early.message


def test_a_sender_whose_clock_is_behind_may_get_grace() -> None:
    frame = seal(expires_at=NOW + 2000)
    verifier = Verifier(keyset(), Clock(NOW + 2000 + 29_999))
    assert verifier.verify_envelope(frame, subject=SUBJECT, types=TYPES, grace_ms=crypto.MAX_SKEW_MS)
    refused(EnvelopeExpired, frame, clock=Clock(NOW + 2000 + 30_000), grace_ms=crypto.MAX_SKEW_MS)


def test_a_key_is_in_force_for_its_time_only() -> None:
    refused(KeyExpired, seal(), clock=Clock(NOW + YEAR))
    refused(KeyExpired, seal(), clock=Clock(NOW - 1001 - crypto.MAX_SKEW_MS))


def test_a_replay_is_refused_for_as_long_as_the_message_counts() -> None:
    verifier = Verifier(keyset(), clock := Clock())
    frame = seal(at=NOW + crypto.MAX_SKEW_MS)

    def arrive() -> None:
        verifier.verify_envelope(frame, subject=SUBJECT, types=TYPES, once=True)

    arrive()
    for later in (0, 1, 59_999, 60_000, 60_001, 60_000 + crypto.MAX_SKEW_MS):
        clock.now = NOW + later
        with pytest.raises(Replayed):
            arrive()
    clock.now += 1
    with pytest.raises(EnvelopeExpired):
        arrive()


def test_a_refused_frame_does_not_use_up_its_nonce_and_others_may_repeat() -> None:
    verifier = Verifier(keyset(), Clock())
    frame = seal()
    with pytest.raises(SubjectMismatch):
        verifier.verify_envelope(frame, subject="elsewhere", types=TYPES, once=True)
    for _ in range(2):
        verifier.verify_envelope(frame, subject=SUBJECT, types=TYPES)
    verifier.verify_envelope(frame, subject=SUBJECT, types=TYPES, once=True)


def test_the_memory_of_nonces_is_bounded() -> None:
    verifier = Verifier(keyset(), Clock(), replay_capacity=4)
    for _ in range(20):
        verifier.verify_envelope(seal(), subject=SUBJECT, types=TYPES, once=True)
    assert len(verifier._seen) <= 4


def test_a_header_over_the_limit_is_not_signed() -> None:
    with pytest.raises(BadEncoding, match="limit"):
        seal(jobs=tuple("j" * 32 for _ in range(500)))


def test_four_hundred_jobs_fit_one_header() -> None:
    assert seal(jobs=tuple("j" * 32 for _ in range(400)), reply="r" * 100)


def test_an_identity_does_not_print_its_secret() -> None:
    assert GATEWAY.seed.hex() not in repr(GATEWAY)
    assert repr(GATEWAY.seed) not in repr(GATEWAY)


# the keyset


def test_the_keyset_opens_with_the_pinned_root_only() -> None:
    signed = crypto.sign_keyset(ROOT, keyset())
    assert crypto.open_keyset(signed, crypto.root_public_key(ROOT), now_ms=NOW, newer_than=3) == keyset()
    for data, public in (
        (signed, crypto.root_public_key(os.urandom(32))),
        (signed, b"short"),
        (signed[:-1], crypto.root_public_key(ROOT)),
        (bytes(64) + signed[64:], crypto.root_public_key(ROOT)),
        (signed[64:], crypto.root_public_key(ROOT)),
        (b"", crypto.root_public_key(ROOT)),
    ):
        with pytest.raises(KeysetError, match="not signed"):
            crypto.open_keyset(data, public, now_ms=NOW)


def test_a_signed_keyset_that_is_none_is_refused() -> None:
    body = codec.pack({"version": 1})
    signed = nacl.signing.SigningKey(ROOT).sign(crypto.KEYSET_DOMAIN + body).signature + body
    with pytest.raises(KeysetError, match="decoded"):
        crypto.open_keyset(signed, crypto.root_public_key(ROOT), now_ms=NOW)


@pytest.mark.parametrize(
    ("now", "newer", "reason"),
    [(NOW, 4, "older"), (NOW + YEAR, 0, "expired"), (NOW - 1001 - crypto.MAX_SKEW_MS, 0, "not yet valid")],
)
def test_an_old_or_expired_keyset_is_refused(now: int, newer: int, reason: str) -> None:
    signed = crypto.sign_keyset(ROOT, keyset())
    with pytest.raises(KeysetError, match=reason):
        crypto.open_keyset(signed, crypto.root_public_key(ROOT), now_ms=now, newer_than=newer)
