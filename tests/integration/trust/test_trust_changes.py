"""What becomes of stored entries when the key that signed them is rotated or revoked."""

from __future__ import annotations

import msgspec
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.configs import configure
from support.platform.services import Services

from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.key_value.keyset_sync import TrustedKeyset, offer
from tether.bus.session import connect
from tether.crypto import Identity, MessageType, Role, Signer, new_identity, sign_keyset
from tether.domain.api_key import ApiKey, new_key_text, stored_key
from tether.domain.tenant import Tenant
from tether.errors import Forbidden, Unauthenticated
from tether.gateway_http import gateway as core
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.identity.resigning import keys_of, resign
from tether.model.config import ModelConfig
from tether.process import metrics
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, load_identity, write_secret
from tether.storage.model_files import open_manifest
from tether.streams.layout import ensure_platform
from tether.wire import codec
from tether.wire.subjects import token

WAIT_S = 5.0


def root(home: Home) -> RootKey:
    return RootKey(home.root_key)


async def prepared(broker: Broker) -> None:
    async with connect(broker.settings, broker.home, "dispatcher", follow=False) as dispatcher:
        await ensure_platform(dispatcher, broker.settings)


async def test_entries_outlive_the_rotation_of_the_key_that_signed_them(broker: Broker) -> None:
    await prepared(broker)
    cases = [
        ("gateway", "apikeys", MessageType.API_KEY),
        ("gateway", "tenants", MessageType.TENANT),
        ("modelstore", "models", MessageType.MANIFEST),
        ("modelstore", "aliases", MessageType.ALIAS),
        ("modelstore", "modelkeys", MessageType.MODEL_KEY),
    ]
    for name, bucket, kind in cases:
        async with connect(broker.settings, broker.home, name, follow=False) as bus:
            await SignedBucket(bus, bucket, kind).put("a", b"before")
    for name in ("gateway", "modelstore"):
        keyset_editor.rotate(broker.home, root(broker.home), name, grace_s=0)
    async with connect(broker.settings, broker.home, "gateway", follow=False) as bus:
        for _, bucket, kind in cases:
            assert await SignedBucket(bus, bucket, kind).get("a") == b"before", bucket


def api_key(name: str, tenant: str = "acme") -> tuple[str, ApiKey]:
    text = new_key_text()
    return text, stored_key(text, tenant=tenant, scopes=("infer",), name=name, created_at=0.0)


async def store(broker: Broker, signer: Signer, bucket: str, key: str, body: bytes) -> None:
    """Store what ``signer`` signed; the administrator's login brings it to the broker."""
    async with connect(broker.settings, broker.home, "admin", follow=False) as bus:
        raw = KvBucket(bus, bucket)
        kind = {"apikeys": MessageType.API_KEY, "tenants": MessageType.TENANT}[bucket]
        await raw.put(key, signer.sign_envelope(kind, raw.subject(key), body))


def known(home: Home, identity: Identity) -> None:
    """The keyset of ``home`` names one more identity."""
    keyset, now = TrustedKeyset.load(home).keyset, SystemClock().utc_ms()
    record = identity.record(not_before=now - 60_000, expires_at=now + 3_600_000)
    newer = msgspec.structs.replace(keyset, version=keyset.version + 1, identities=(*keyset.identities, record))
    write_secret(home.keyset, sign_keyset(home.root_key.read_bytes(), newer))


def second_admin() -> tuple[Identity, Signer]:
    identity = new_identity("admin-2", Role.ADMIN)
    return identity, Signer(identity, SystemClock().utc_ms)


async def published(broker: Broker) -> None:
    async with connect(broker.settings, broker.home, "admin", follow=False) as bus:
        await offer(bus, TrustedKeyset.load(broker.home))


def refused(one: Services, text: str) -> bool:
    try:
        one.gateway.keys.authenticate(text, "infer")
    except Unauthenticated:
        return True
    return False


async def test_an_api_key_that_a_thief_made_ends_with_the_identity_it_was_made_with(
    broker: Broker, one: Services
) -> None:
    """A gateway that runs all the while must not know better than one that starts afterwards."""
    theirs, ours = api_key("theirs"), api_key("ours")
    identity, signer = second_admin()
    known(broker.home, identity)
    await store(broker, signer, "apikeys", theirs[1].id, codec.encode(theirs[1]))
    await one.gateway.keys.store(ours[1])
    await wait_until(lambda: not refused(one, theirs[0]) and not refused(one, ours[0]), "both keys count", WAIT_S)
    keyset_editor.revoke(broker.home, root(broker.home), "admin-2")
    await published(broker)
    await wait_until(lambda: refused(one, theirs[0]), "the thief's key ends", WAIT_S)
    assert not refused(one, ours[0])


async def test_an_entry_that_comes_before_the_keyset_with_its_signer_is_believed_later(
    broker: Broker, one: Services
) -> None:
    text, record = api_key("early")
    identity, signer = second_admin()
    unknown = metrics.ENVELOPES_REJECTED.labels("unknown_key")._value
    before = unknown.get()
    await store(broker, signer, "apikeys", record.id, codec.encode(record))
    await wait_until(lambda: unknown.get() > before, "the gateway hears of the entry", WAIT_S)
    assert refused(one, text)
    known(broker.home, identity)
    await published(broker)
    await wait_until(lambda: not refused(one, text), "the key counts", WAIT_S)


async def test_a_tenant_whose_record_cannot_be_believed_is_refused_and_not_taken_for_one_without_limits(
    broker: Broker,
) -> None:
    await prepared(broker)
    text, record = api_key("of a sealed tenant", "acme")
    sealed = codec.encode(Tenant("acme", isolated=True, sealed=True))
    identity, signer = second_admin()
    known(broker.home, identity)
    await published(broker)
    async with connect(broker.settings, broker.home, "gateway", follow=False) as bus:
        await SignedBucket(bus, "apikeys", MessageType.API_KEY).put(record.id, codec.encode(record))
    await store(broker, signer, "tenants", token("acme"), sealed)
    revoked = keys_of(broker.home, "admin-2")
    keyset_editor.revoke(broker.home, root(broker.home), "admin-2")
    async with core.running(broker.settings, broker.home) as gateway:
        await wait_until(lambda: gateway.keys.find(record.id) is not None, "the key is known", WAIT_S)
        with pytest.raises(Forbidden, match="cannot be verified"):
            gateway.keys.authenticate(text, "infer")
        done = await resign(broker.settings, broker.home, revoked, SystemClock().utc_ms() + 1)
        assert done.signed == ["tenants/acme"]
        await wait_until(lambda: gateway.tenants.pool("acme") == "acme", "the record counts again", WAIT_S)
        assert gateway.keys.authenticate(text, "infer").tenant == "acme"
    async with connect(broker.settings, broker.home, "modelstore", follow=False) as bus:
        assert await SignedBucket(bus, "tenants", MessageType.TENANT).require(token("acme")) == sealed


async def test_what_a_revoked_model_store_signed_before_the_leak_is_signed_anew_and_what_came_later_is_not(
    broker: Broker, one: Services
) -> None:
    home = broker.home
    served = await one.push("m", models.add(1.0))
    await configure(one, ModelConfig("m", revision=1, threads=1))
    old = load_identity(home.identity("modelstore"))
    leak = SystemClock().utc_ms()
    await wait_until(lambda: SystemClock().utc_ms() > leak, "time goes on", WAIT_S)
    async with connect(broker.settings, home, "modelstore", follow=False) as thief:
        assert thief.signer.kid == old.kid
        await SignedBucket(thief, "aliases", MessageType.ALIAS).put("theirs", b"theirs")
    keyset_editor.rotate(home, root(home), "modelstore", grace_s=3600)
    done = await resign(broker.settings, home, {old.kid}, leak)
    key = one.bus.names.version_key("m", served.manifest.version)
    assert f"models/{key}" in done.signed
    assert "configs/m" in done.signed
    assert len(done.signed) == 4  # its alias, its configuration and its owner too
    assert done.left == ["aliases/theirs"]
    keyset_editor.revoke(home, root(home), old.kid.hex())
    async with connect(broker.settings, home, "gateway", follow=False) as bus:
        frame = await KvBucket(bus, "models").get(key)
        assert frame is not None
        assert open_manifest(bus.verifier, bus.names, key, frame) == served.manifest
        assert await SignedBucket(bus, "aliases", MessageType.ALIAS).get("theirs") is None
    again = await resign(broker.settings, home, {old.kid}, leak)
    assert again.signed == []


async def test_a_key_does_not_vouch_for_what_it_signed_itself(broker: Broker) -> None:
    await prepared(broker)
    done = await resign(broker.settings, broker.home, keys_of(broker.home, "modelstore"), SystemClock().utc_ms())
    assert done.nobody == ["models", "aliases", "configs", "notes", "modelkeys"]
