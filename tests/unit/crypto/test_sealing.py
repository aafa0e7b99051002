"""Seals: what opens where, who holds which generation, and that nothing of a payload is outside."""

from __future__ import annotations

import dataclasses
import itertools
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.crypto import Identity, Role, new_identity
from tether.crypto.payload_encryption import (
    Box,
    DataKey,
    KeyOpener,
    Purpose,
    TenantKeys,
    WrappedKey,
    brought_up_to_date,
    data_key_id,
    entitled,
    new_data_key,
    open_job,
    open_outcome,
    seal_job,
    seal_outcome,
)
from tether.domain.job import Failure, Job, JobId, JobState, Outcome, Sealed
from tether.domain.tensor import Tensor
from tether.errors import BadEncoding, DecryptionFailed
from tether.wire import codec

DAY = 86_400_000
KEY = new_data_key(1)
JOB = Job(JobId("j" * 32), "clinic", (Tensor("age", "INT8", (1,), b"\x2a"),), 5.0, ("risk",), "r", "00-t")
END = Outcome(JobId("j" * 32), JobState.SUCCEEDED, (Tensor("risk", "BYTES", (1,), b"secret"),), None, 1, "w", 1.0, 2.0)


@given(st.binary(max_size=300))
def test_what_was_sealed_opens_with_the_same_key(plain: bytes) -> None:
    sealed = KEY.encrypt(Purpose.INPUTS, "job", "t", plain)
    assert KEY.decrypt(Purpose.INPUTS, "job", "t", sealed) == plain
    assert len(sealed) == len(plain) + 24 + 16


def test_no_two_seals_are_alike() -> None:
    seals = {KEY.encrypt(Purpose.INPUTS, "job", "t", b"same") for _ in range(100)}
    assert len(seals) == len({seal[:24] for seal in seals}) == 100


@pytest.mark.parametrize(
    ("purpose", "job", "tenant"),
    [(Purpose.OUTCOME, "job", "t"), (Purpose.INPUTS, "job2", "t"), (Purpose.INPUTS, "job", "u")],
)
def test_a_seal_opens_for_its_own_purpose_job_and_tenant_only(purpose: Purpose, job: str, tenant: str) -> None:
    with pytest.raises(DecryptionFailed):
        KEY.decrypt(purpose, job, tenant, KEY.encrypt(Purpose.INPUTS, "job", "t", b"plain"))


def test_a_seal_opens_with_its_own_key_only_and_not_when_a_bit_changed() -> None:
    sealed = KEY.encrypt(Purpose.INPUTS, "job", "t", b"plain")
    with pytest.raises(DecryptionFailed):
        new_data_key(1).decrypt(Purpose.INPUTS, "job", "t", sealed)
    for position in range(len(sealed)):
        changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        with pytest.raises(DecryptionFailed):
            KEY.decrypt(Purpose.INPUTS, "job", "t", changed)
    for short in (b"", sealed[:10], sealed[:24], sealed[:-1]):
        with pytest.raises(DecryptionFailed):
            KEY.decrypt(Purpose.INPUTS, "job", "t", short)


def test_a_data_key_does_not_print_its_secret() -> None:
    secret = os.urandom(32)
    assert secret.hex() not in repr(DataKey(secret, 1))
    assert repr(secret) not in repr(DataKey(secret, 1))


def test_a_sealed_job_has_nothing_of_its_payload_outside_and_stays_sealed_where_it_was_opened() -> None:
    sealed = seal_job(KEY, JOB)
    wire = codec.encode_jobs([sealed, JOB])
    assert wire.count(b"age") == wire.count(b"risk") == wire.count(b"INT8") == 1
    (arrived, neighbour) = codec.decode_jobs(wire, [JOB.id, JOB.id])
    assert (arrived, neighbour) == (sealed, JOB)
    opened = open_job(KEY, arrived)
    assert msgspec.structs.replace(opened, sealed=None) == JOB
    assert codec.encode_jobs([opened]) == codec.encode_jobs([sealed])
    assert open_job(KEY, JOB) is JOB


@pytest.mark.parametrize(
    "end", [END, msgspec.structs.replace(END, outputs=(), error=Failure("code", "secret"), state=JobState.FAILED)]
)
def test_a_sealed_outcome_has_nothing_of_its_end_outside(end: Outcome) -> None:
    sealed = seal_outcome(KEY, "clinic", end)
    wire = codec.encode_outcomes([sealed])
    assert b"secret" not in wire
    assert b"risk" not in wire
    (arrived,) = codec.decode_outcomes(wire)
    assert open_outcome(KEY, "clinic", arrived) == end
    with pytest.raises(DecryptionFailed):
        open_outcome(KEY, "bank", arrived)


@pytest.mark.parametrize(
    "plain", [b"", b"\xc0", codec.pack(((), 7)), codec.pack((((1,)), ())), codec.pack((("a",), (), ()))]
)
def test_a_seal_around_something_else_is_bad_encoding(plain: bytes) -> None:
    sealed = Sealed(KEY.id, KEY.encrypt(Purpose.INPUTS, JOB.id, JOB.tenant, plain))
    with pytest.raises(BadEncoding):
        open_job(KEY, msgspec.structs.replace(JOB, inputs=(), sealed=sealed))


def test_a_digest_tells_nothing_without_the_key() -> None:
    assert KEY.digest("d") == KEY.digest("d")
    assert len({KEY.digest("d"), KEY.digest("e"), new_data_key(1).digest("d")}) == 3


# who holds what


@dataclasses.dataclass
class Platform:
    """Identities, and a tenant's keys as gateways keep them."""

    people: dict[str, Identity]
    keys: TenantKeys = dataclasses.field(default_factory=lambda: TenantKeys("clinic", 0, ()))
    version: int = 1
    now: int = DAY

    def holders(self, *names: str) -> dict[bytes, bytes]:
        records = [self.people[name].record(not_before=0, expires_at=9 * DAY) for name in names]
        return entitled(records, "", self.now)

    def keep(self, *names: str, by: str = "gateway", version: int = 0) -> TenantKeys:
        """Bring the keys up to date as one gateway that sees this keyset."""
        self.version = version or self.version + 1
        self.keys = brought_up_to_date(
            self.keys,
            self.holders(*names),
            KeyOpener(self.people[by]),
            keyset_version=self.version,
            now_ms=self.now,
            keep_ms=3 * DAY,
        )
        return self.keys

    def opens(self, name: str) -> list[bool]:
        opener = KeyOpener(self.people[name])
        return [opener.open(key) is not None for key in self.keys.keys]


@pytest.fixture
def platform() -> Platform:
    names = {"gateway": Role.GATEWAY, "gateway-2": Role.GATEWAY, "w1": Role.WORKER, "w2": Role.WORKER}
    return Platform({name: new_identity(name, role) for name, role in names.items()})


def test_the_first_key_is_made_for_everyone_entitled_and_then_left_alone(platform: Platform) -> None:
    first = platform.keep("gateway", "w1")
    assert (platform.opens("gateway"), platform.opens("w1"), platform.opens("w2")) == ([True], [True], [False])
    assert platform.keep("gateway", "w1") is first


def test_who_joins_can_open_what_was_sealed_before(platform: Platform) -> None:
    before = platform.keep("gateway", "w1")
    platform.keep("gateway", "w1", "w2", "gateway-2")
    assert [key.id for key in platform.keys.keys] == [key.id for key in before.keys]
    assert (platform.opens("w2"), platform.opens("gateway-2")) == ([True], [True])


def test_who_leaves_cannot_open_what_is_sealed_from_then_on_and_the_others_still_open_everything(
    platform: Platform,
) -> None:
    old = platform.keep("gateway", "w1", "w2").keys[0]
    platform.keep("gateway", "w1")
    assert (platform.opens("w2"), platform.opens("w1"), platform.opens("gateway")) == (
        [False] * 2,
        [True] * 2,
        [True] * 2,
    )
    assert platform.keys.keys[1].id != old.id
    assert platform.keys.keys[1].generation == old.generation + 1


def test_a_gateway_that_comes_alone_makes_a_new_key_and_keeps_what_others_hold(platform: Platform) -> None:
    platform.keep("gateway", "w1")
    platform.keep("gateway-2", "w1", by="gateway-2")
    assert (platform.opens("w1"), platform.opens("gateway-2")) == ([True, True], [False, True])


def test_who_knows_an_older_keyset_changes_nothing(platform: Platform) -> None:
    newer = platform.keep("gateway", "w1", version=7)
    assert platform.keep("gateway", "w1", "w2", version=6) is newer


def test_a_gateway_that_is_not_entitled_changes_nothing(platform: Platform) -> None:
    assert platform.keep("gateway", "w1", by="gateway-2").keys == ()
    kept = platform.keep("gateway", "w1")
    assert platform.keep("w1", by="gateway") is kept


def test_replaced_keys_are_dropped_after_their_time(platform: Platform) -> None:
    platform.keep("gateway", "w1", "w2")
    platform.keep("gateway", "w1")
    platform.now += 3 * DAY - 1
    assert len(platform.keep("gateway", "w1").keys) == 2
    platform.now += 1
    assert [key.generation for key in platform.keep("gateway", "w1").keys] == [2]


def test_gateways_and_the_workers_that_serve_a_tenant_are_entitled() -> None:
    people = [
        msgspec.structs.replace(new_identity(name, role).record(not_before=0, expires_at=end), tenant=tenant)
        for name, role, tenant, end in (
            ("gateway", Role.GATEWAY, "", 10),
            ("shared", Role.WORKER, "", 10),
            ("bound", Role.WORKER, "clinic", 10),
            ("other", Role.WORKER, "bank", 10),
            ("gone", Role.WORKER, "", 5),
            ("dispatcher", Role.DISPATCHER, "", 10),
            ("store", Role.MODELSTORE, "", 10),
            ("admin", Role.ADMIN, "", 10),
        )
    ]
    names = {record.kid: record.name for record in people}
    assert {names[kid] for kid in entitled(people, "", 5)} == {"gateway", "shared"}
    assert {names[kid] for kid in entitled(people, "clinic", 5)} == {"gateway", "bound"}


def test_a_box_with_another_key_or_rubbish_opens_nothing(platform: Platform) -> None:
    one, other = new_data_key(1), new_data_key(1)
    me = platform.people["w1"]
    public = me.record(not_before=0, expires_at=1).x25519
    for sealed in (other.wrapped(public), b"", os.urandom(80)):
        assert KeyOpener(me).open(WrappedKey(one.id, 1, 0, (Box(me.kid, sealed),))) is None
    found = KeyOpener(me).open(WrappedKey(one.id, 1, 0, (Box(me.kid, one.wrapped(public)),)))
    assert found is not None
    assert found.id == one.id


def test_an_identity_with_a_new_key_still_opens_what_was_wrapped_for_its_old_one(platform: Platform) -> None:
    old, new = platform.people["w1"], new_identity("w1", Role.WORKER)
    opener = KeyOpener(old)
    opener.add(new)
    key = new_data_key(3)
    for one in (old, new):
        wrapped = WrappedKey(key.id, 3, 0, (Box(one.kid, key.wrapped(one.record(not_before=0, expires_at=1).x25519)),))
        assert opener.open(wrapped) is not None


def test_the_id_of_a_key_is_that_of_its_secret() -> None:
    secrets = [bytes([number]) * 32 for number in range(3)]
    assert len({data_key_id(secret) for secret in secrets}) == 3
    assert all(DataKey(one, 1).id != DataKey(two, 1).id for one, two in itertools.combinations(secrets, 2))


def test_keys_survive_the_wire(platform: Platform) -> None:
    keys = platform.keep("gateway", "w1")
    assert codec.decode(codec.encode(keys), TenantKeys) == keys
