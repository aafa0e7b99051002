"""What deleted versions left counts in the quota ``stored_bytes`` until it is collected."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from support.brokers.brokers import Broker, wait_until
from support.brokers.stores import MB, Platform, platform_on
from support.models import models

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType, Verifier
from tether.domain.manifest import Change, ChangeRequest, Manifest, PushRequest
from tether.domain.tenant import Quotas, Tenant
from tether.errors import QuotaExceeded
from tether.gateway_http.models.catalog import Catalog
from tether.identity.resigning import _Work
from tether.modelstore.records.registry import Registry
from tether.modelstore.registration import model_changes
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.storage.model_files import open_manifest
from tether.storage.stored_bytes import StoredVersions
from tether.wire import codec
from tether.wire.subjects import Names, token


@dataclass
class Bounded:
    """A platform on which the tenant ``acme`` may store 15 MB, and a keeper for whom every chunk is old enough at once."""

    platform: Platform
    keeper: ChunkCollector
    registry: Registry
    stored_versions: StoredVersions
    bus: Bus

    async def push(self, seed: int, model: str = "acme/m", tenant: str = "acme") -> int:
        """Push a model of 6 MB; its version."""
        file, _ = await self.platform.upload(models.padded(6 * MB, seed=seed), model=model)
        return (await self.platform.register(PushRequest(model, (file,), tenant=tenant))).manifest.version

    async def delete(self, version: int, model: str = "acme/m") -> None:
        """A version, and the alias that stands for it."""
        wanted = ChangeRequest(Change.DELETE_ALIAS, model, alias="latest", tenant="acme")
        for change in (wanted, ChangeRequest(Change.DELETE_VERSION, model, version=version, tenant="acme")):
            body = codec.encode(change)
            await ask_owner(
                self.platform.bus,
                model_changes.ENDPOINT,
                0,
                MessageType.CHANGE,
                body,
                answers=MessageType.CHANGED,
                timeout=30,
            )

    async def stored(self) -> int:
        return round(await self.stored_versions.of("acme") / MB)


@pytest.fixture
async def bounded(broker: Broker) -> AsyncIterator[Bounded]:
    settings = dataclasses.replace(broker.settings, unreferenced_ttl_s=0.0, gc_grace_s=0.0)
    async with (
        platform_on(broker) as platform,
        connect(settings, broker.home, "modelstore") as bus,
    ):
        tenants = SignedBucket(platform.bus, "tenants", MessageType.TENANT)
        await tenants.put(token("acme"), codec.encode(Tenant("acme", quotas=Quotas(stored_bytes=15 * MB))))
        registry = Registry(bus)
        keeper = ChunkCollector(bus, registry, ModelKeyring(bus, broker.home, every=True))
        yield Bounded(platform, keeper, registry, StoredVersions(bus), bus)


async def test_push_and_delete_again_and_again_stops_at_the_quota(bounded: Bounded) -> None:
    for seed in (1, 2):
        await bounded.delete(await bounded.push(seed))
    assert await bounded.stored() == 12
    with pytest.raises(QuotaExceeded, match="stored_bytes"):
        await bounded.push(3)
    await bounded.push(4, "globex/m", tenant="globex")
    for _ in range(2):
        await bounded.keeper.collect()
    assert await bounded.stored() == 0
    assert await bounded.registry.deleted() == []
    assert await bounded.push(5) == 3  # a number is never given out again


async def test_what_a_version_names_again_counts_once(bounded: Bounded) -> None:
    for number in (1, 2, 3):
        assert await bounded.push(7) == number
        assert await bounded.stored() == 6
        if number < 3:
            await bounded.delete(number)
            assert await bounded.stored() == 6
    await bounded.keeper.collect()
    assert await bounded.registry.deleted() == []
    assert await bounded.stored() == 6


async def test_a_deleted_version_stays_deleted_for_all_who_read(bounded: Bounded) -> None:
    """Its manifest is beside the note that it is gone; signing entries anew does not bring it back."""
    await bounded.delete(await bounded.push(1))
    bucket = KvBucket(bounded.bus, "models")
    assert [left.manifest.version for left in await bounded.registry.deleted()] == [1]
    assert await bucket.get("acme/m.1") is None
    assert await bucket.was_deleted("acme/m.1")
    assert await bucket.entries() == {}
    assert await bounded.registry.manifests() == []
    assert not await bounded.registry.recorded("m", 1)
    signers = {item.kid for item in bounded.bus.verifier.keyset.identities}
    work = _Work(bounded.bus, None, signers, 1 << 62)  # type: ignore[arg-type]
    await work.through(SignedBucket(bounded.bus, "models", MessageType.MANIFEST), None)  # type: ignore[arg-type]
    assert await bucket.was_deleted("acme/m.1")


async def test_gateways_count_what_the_model_store_counts(bounded: Bounded) -> None:
    """Also one that starts later, and after a collection; and nobody learns from it what other tenants have."""
    catalog = Catalog(bounded.platform.bus)

    async def all_count(megabytes: int) -> None:
        assert await bounded.stored() == megabytes
        await wait_until(lambda: round(catalog.stored.of("acme") / MB) == megabytes, "the gateway counts the same")
        late = Catalog(bounded.platform.bus)
        async with late.watching():
            assert round(late.stored.of("acme") / MB) == megabytes

    async with catalog.watching():
        await bounded.push(1, "globex/other", tenant="globex")
        await bounded.push(1)
        await all_count(6)
        await bounded.delete(1)
        await all_count(6)
        await bounded.push(2)
        await all_count(12)
        for _ in range(2):
            await bounded.keeper.collect()
        await all_count(6)
    assert round(catalog.stored.of("globex") / MB) == 6


async def test_a_push_reads_no_manifests_of_others_again(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others have was read once."""
    for number in range(6):
        await bounded.push(number, model=f"other/m{number}", tenant="other")
    await bounded.push(10)
    read: list[str] = []

    def noted(verifier: Verifier, names: Names, key: str, frame: bytes) -> Manifest:
        manifest = open_manifest(verifier, names, key, frame)
        read.append(manifest.tenant)
        return manifest

    monkeypatch.setattr("tether.storage.stored_bytes.open_manifest", noted)
    await bounded.push(11)
    assert read == ["acme"], "the version before"
    await bounded.push(20, model="other/m20", tenant="other")
    assert read == ["acme"], "a tenant without a quota costs nothing"
    with pytest.raises(QuotaExceeded):
        await bounded.push(12)
    assert sorted(read) == ["acme", "acme", "other"]
