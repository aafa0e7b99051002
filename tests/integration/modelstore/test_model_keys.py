"""The data keys of encrypted models: who has them, who has them no more, and another key for what is stored."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.brokers.brokers import Broker, embedded, wait_until
from support.models import models
from support.platform.encryption import believe, without
from support.platform.services import ASKER, Services, services
from support.platform.tenancy import bound_home, isolate, own_worker

from tether.broker.embedded_server import Binary, reload_embedded
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType, Role
from tether.crypto.model_encryption import ModelKeys, model_holders
from tether.dispatcher import service as dispatcher_service
from tether.domain.manifest import Change, Manifest, ModelRef, PushAnswer, PushRequest
from tether.errors import ModelNotFound, NoDecryptionKey, TmpfsUnavailable, Unavailable
from tether.gateway_http import gateway as core
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.modelstore import service as modelstore_service
from tether.modelstore.records.assigned_workers import Assigned
from tether.modelstore.records.registry import Registry
from tether.modelstore.service import ENDPOINT
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.modelstore.upkeep.key_rotation import ModelKeyRotation
from tether.process.data_dir import load_identity
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.upload import upload
from tether.wire import codec

SIZE = 3 << 20


def stored(running: Services, model: str = "m") -> ModelKeys:
    found = running.gateway.encrypted_models.keyring.stored(model)
    assert found is not None
    return found


def holders(running: Services, model: str = "m") -> set[str]:
    """Who has the newest key of a model, as the gateway last saw it."""
    names = {record.kid: record.name for record in running.bus.verifier.keyset.identities}
    return {names.get(kid, "?") for kid in stored(running, model).keys[-1].holders()}


def manifest(running: Services, version: int = 1, model: str = "m") -> Manifest:
    return running.gateway.catalog.resolve(model, str(version)).manifest


async def works(running: Services, served: ResolvedVersion) -> None:
    answer = await running.infer(served, np.ones((1, 1), np.float32))
    assert np.isfinite(answer).all()


async def chunks(running: Services, found: Manifest) -> bytes:
    """The whole content of a version's first file, as a gateway reads it."""
    plain = running.gateway.encrypted_models.plain(found)
    async with aclosing(running.gateway.encrypted_models.store(found).get(plain.files[0].chunks)) as parts:
        return b"".join([part async for part in parts])


async def test_model_stores_gateways_and_workers_have_the_key_and_nobody_else(one: Services) -> None:
    await works(one, await one.push("m", models.padded(SIZE), encrypt=True))
    assert holders(one) == {"modelstore", "gateway", "worker-1"}, "worker-2 does not run"


async def test_a_worker_has_the_key_of_a_model_while_it_is_told_to_hold_it(one: Services) -> None:
    both = {"worker-1", "worker-2"}
    await one.start_worker("worker-2")
    served = await one.push("m", models.padded(SIZE), encrypt=True)
    await wait_until(lambda: holders(one) >= both, "both have a box")
    key = stored(one).keys[-1].id
    await one.decide("m", replicas_max=1)
    await wait_until(lambda: len(holders(one) & both) == 1, "one of them has no box any more", 40)
    (told,) = holders(one) & both
    for worker in one.workers:
        opened = worker.model_keyring.known("m", key) is not None
        assert opened == (worker._bus.signer.name == told)
    other = next(worker for worker in one.workers if worker._bus.signer.name != told)
    with pytest.raises(NoDecryptionKey):
        await other.model_keyring.opened(manifest(one))
    await works(one, served)
    await one.decide("m", replicas_max=2)
    await wait_until(lambda: holders(one) >= both, "both have one again", 40)
    await wait_until(lambda: other.holder.ready() == (ModelRef("m", 1),), "and hold the model", 40)
    assert [wrapped.id for wrapped in stored(one).keys] == [key], "nothing is stored again for it"


async def test_a_worker_that_is_bound_to_a_tenant_has_the_keys_of_its_models_alone(nats_binary: Binary) -> None:
    with bound_home(own="acme") as home:
        async with embedded(home, nats_binary) as broker, services(broker, workers=1) as running:
            shown = await running.push("shown", models.padded(SIZE), encrypt=True)
            await running.push("hidden", models.padded(SIZE, seed=2), encrypt=True)
            await isolate(running, "acme", shown, models=("shown",))
            await own_worker(running, "own", shown, "acme")
            await wait_until(lambda: "own" in holders(running, "shown"), "it has the key of the one")
            assert holders(running, "hidden") == {"modelstore", "gateway", "worker-1"}
            with pytest.raises(NoDecryptionKey):
                await running.workers[-1].model_keyring.opened(manifest(running, model="hidden"))


async def test_without_a_model_store_a_worker_loads_what_it_held_and_new_ones_wait_for_it(broker: Broker) -> None:
    async with services(broker, workers=1) as running:
        await running.push("m", models.padded(SIZE), encrypt=True)
    async with AsyncExitStack() as stack:
        dispatcher = await stack.enter_async_context(dispatcher_service.running(broker.settings, broker.home))
        gateway = await stack.enter_async_context(core.running(broker.settings, broker.home))
        running = Services(broker.home, broker.settings, stack, gateway, dispatcher)
        first, second = await running.start_worker("worker-1"), await running.start_worker("worker-2")
        await wait_until(lambda: first.holder.ready() == (ModelRef("m", 1),), "it has the key of before", 40)
        await wait_until(lambda: bool(second.holder.failed()), "the other one has none", 40)
        ((_, reason),) = second.holder.failed()
        assert reason.split(":")[0] == NoDecryptionKey.code
        await stack.enter_async_context(modelstore_service.running(broker.settings, broker.home))
        await wait_until(lambda: second.holder.ready() == (ModelRef("m", 1),), "it gets one and loads", 60)


async def test_who_may_not_read_assignments_takes_every_worker_for_told(one: Services) -> None:
    """As a model store under a configuration of the broker from before."""
    assigned = Assigned(one.bus)
    async with assigned.following():
        assert assigned.to("m") is None
    every = model_holders(one.bus.verifier.keyset.identities, one.bus.clock.utc_ms(), assigned.to("m"))
    assert len(every) == 4


async def test_who_is_not_entitled_gets_a_typed_refusal_and_the_model_when_it_is_again(one: Services) -> None:
    """The box of a worker is withdrawn; others are as they were; when the keyset names it again, it gets one by itself."""
    await works(one, await one.push("m", models.padded(SIZE), encrypt=True))
    believe(one, without("worker-2"))
    await wait_until(lambda: "worker-2" not in holders(one), "its box is withdrawn")
    second = await one.start_worker("worker-2")
    await wait_until(lambda: bool(second.holder.failed()), "it says that it cannot load")
    ((what, reason),) = second.holder.failed()
    assert (what, reason.split(":")[0]) == ("m:1", NoDecryptionKey.code)
    with pytest.raises(NoDecryptionKey):
        await second.model_keyring.opened(manifest(one))
    assert one.workers[0].holder.ready() == (ModelRef("m", 1),)
    everyone = one.bus.verifier.keyset
    believe(one, lambda _: everyone)
    await wait_until(lambda: second.holder.ready() == (ModelRef("m", 1),), "it loads by itself", 40)
    assert second.holder.failed() == ()


async def test_a_worker_without_a_place_in_memory_says_so_and_holds_what_is_not_encrypted(
    one: Services, tmp_path: Path
) -> None:
    await one.push("m", models.padded(SIZE), encrypt=True)
    await one.push("plain", models.padded(SIZE), workers=1)
    one.settings = dataclasses.replace(one.settings, decrypted_model_dir=str(tmp_path))
    second = await one.start_worker("worker-2")
    await wait_until(lambda: second.holder.ready() == (ModelRef("plain", 1),), "it holds the one")
    await wait_until(lambda: bool(second.holder.failed()), "and not the other")
    ((what, reason),) = second.holder.failed()
    assert (what, reason.split(":")[0]) == ("m:1", TmpfsUnavailable.code)
    assert not list(tmp_path.iterdir())


async def test_a_worker_that_is_added_later_gets_the_key_by_itself(embedded_broker: Broker) -> None:
    async with services(embedded_broker, workers=1) as running:
        await running.push("m", models.padded(SIZE), encrypt=True)
        home = running.home
        keyset_editor.add(home, RootKey(home.root_key), "worker-9", Role.WORKER)
        assert await asyncio.to_thread(reload_embedded, home, running.settings)
        late = await running.start_worker("worker-9")
        await wait_until(lambda: late.holder.ready() == (ModelRef("m", 1),), "it holds the model", 40)
        await wait_until(lambda: "worker-9" in holders(running), "it has a box of its own")


async def test_the_key_outlives_a_restart_and_a_model_store_that_was_rotated_while_it_was_stopped(
    embedded_broker: Broker,
) -> None:
    async with services(embedded_broker, workers=1) as running:
        await running.push("m", models.padded(SIZE), encrypt=True)
        before = stored(running)
    home = embedded_broker.home
    old = load_identity(home.identity("modelstore")).kid
    keyset_editor.rotate(home, RootKey(home.root_key), "modelstore", grace_s=0)
    assert embedded_broker.server is not None
    await embedded_broker.server.kill()
    await embedded_broker.server.start()
    async with services(embedded_broker, workers=1) as running:
        fresh = load_identity(home.identity("modelstore")).kid
        assert fresh != old
        await wait_until(lambda: fresh in stored(running).keys[0].holders(), "the new signing key has a box", 30)
        assert [key.id for key in stored(running).keys] == [key.id for key in before.keys]
        second = await running.push("m", models.padded(SIZE, seed=2))
        assert second.manifest.sealed is not None
        await works(running, second)


async def rekeyed(running: Services, generation: int) -> None:
    """Ask for another key and wait until every version is stored under it."""
    seals = running.gateway.encrypted_models
    assert await seals.ask(Change.REKEY, "m", ASKER) == generation

    def moved() -> bool:
        versions = running.gateway.catalog.versions("m").values()
        return {seals.generation(served.manifest) for served in versions} == {generation}

    await wait_until(moved, "every version is stored under the new key", 40)


async def test_another_key_takes_every_version_along_and_nothing_is_pushed_again(one: Services) -> None:
    first, second = models.padded(SIZE, seed=1), models.padded(SIZE, seed=2)
    await one.push("m", first, encrypt=True)
    served = await one.push("m", second)
    before = {number: manifest(one, number) for number in (1, 2)}
    (old,) = stored(one).keys
    await rekeyed(one, 2)
    after = {number: manifest(one, number) for number in (1, 2)}
    for number in (1, 2):
        assert not set(before[number].files[0].chunks) & set(after[number].files[0].chunks)
        assert before[number].files[0].digest != after[number].files[0].digest
        same = msgspec.structs.replace(after[number], files=before[number].files, sealed=before[number].sealed)
        assert same == before[number]
    assert [await chunks(one, after[number]) for number in (1, 2)] == [first, second]
    await works(one, served)
    assert [key.generation for key in stored(one).keys] == [1, 2], "a push that began before may still need the old one"
    async with other_keys(one, gc_grace_s=0.0) as patient:
        await patient._keep_one("m")
    await wait_until(lambda: old.id not in {key.id for key in stored(one).keys}, "the old key is gone")
    assert (await one.push("m", second)).manifest == after[2]
    await rekeyed(one, 3)
    assert [await chunks(one, manifest(one, number)) for number in (1, 2)] == [first, second]


async def test_chunks_under_the_old_key_are_collected(one: Services) -> None:
    await one.push("m", models.padded(SIZE), encrypt=True)
    old = list(manifest(one).files[0].chunks)
    await rekeyed(one, 2)
    new = list(manifest(one).files[0].chunks)
    store = ObjectChunkStore(one.bus, one.bus.names.chunk_bucket("m"))
    assert await store.missing(old + new) == []
    settings = dataclasses.replace(one.settings, unreferenced_ttl_s=0.0, gc_grace_s=0.0)
    async with connect(settings, one.home, "modelstore") as bus:
        keeper = ChunkCollector(bus, Registry(bus), ModelKeyring(bus, one.home, every=True))
        for _ in range(3):
            await keeper.collect()
    assert await store.missing(old + new) == old
    assert one.modelstore is not None
    assert await one.modelstore.keeper.scrub() == 0
    assert await chunks(one, manifest(one)) == models.padded(SIZE)


async def test_a_key_is_taken_over_when_its_writer_is_revoked_and_never_replaced_unread(
    embedded_broker: Broker,
) -> None:
    """A model store that finds an entry which nobody vouches for makes no new key: what is stored could not be read any
    more."""
    async with services(embedded_broker, workers=1) as running:
        await running.push("m", models.padded(SIZE), encrypt=True)
        assert running.modelstore is not None
        bus = running.modelstore._bus
        body = await SignedBucket(bus, "modelkeys", MessageType.MODEL_KEY).get("m")
        assert body is not None
        evil = SignedBucket(running.workers[0]._bus, "modelkeys", MessageType.MODEL_KEY)
        frame = evil._seal("other", body)
        await bus.publish_acked(bus.names.bucket_key("modelkeys", "other"), frame)
        with pytest.raises(Unavailable, match="cannot be verified"):
            await running.modelstore.keys.ensure("other")
        with pytest.raises(Unavailable, match="cannot be verified"):
            await running.gateway.encrypted_models.encrypts("other", None)
        with pytest.raises(ModelNotFound, match="not encrypted"):
            await running.modelstore.keys.rekey("third")


@asynccontextmanager
async def other_keys(running: Services, **changes: float) -> AsyncIterator[ModelKeyRotation]:
    """What a second model store would do."""
    settings = dataclasses.replace(running.settings, **changes)  # type: ignore[arg-type]
    async with connect(settings, running.home, "modelstore") as bus:
        keyring = ModelKeyring(bus, running.home, every=True)
        async with keyring.watching():
            yield ModelKeyRotation(bus, keyring, Registry(bus))


async def test_two_model_stores_agree_on_one_key(broker: Broker) -> None:
    async with services(broker, workers=0) as running:
        assert running.modelstore is not None
        first = running.modelstore.keys
        async with other_keys(running) as second:
            made = await asyncio.gather(*(keys.ensure("both") for keys in (first, second) for _ in range(4)))
        assert set(made) == {1}
        await wait_until(
            lambda: "both" in running.gateway.encrypted_models.keyring.owners(), "the gateway has heard of it"
        )
        assert len(stored(running, "both").keys) == 1


async def test_a_plain_push_of_an_encrypted_model_must_say_that_it_means_it(one: Services) -> None:
    """A gateway that has not heard of the key yet would store it in the clear."""
    await one.push("m", models.padded(SIZE), encrypt=True)
    store = ObjectChunkStore(one.bus, one.bus.names.chunk_bucket("m"))
    file, _ = await upload(one.bus, store, content(models.padded(SIZE, seed=2)), limit=1 << 30)

    async def register(request: PushRequest) -> PushAnswer:
        kinds = (MessageType.PUSH, MessageType.PUSHED)
        partition = one.bus.names.partition(request.name)
        body = codec.encode(msgspec.structs.replace(request, tenant=ASKER.tenant))
        body = await ask_owner(one.bus, ENDPOINT, partition, kinds[0], body, answers=kinds[1], timeout=60)
        return codec.decode(body, PushAnswer)

    with pytest.raises(Unavailable, match="encrypted"):
        await register(PushRequest("m", (file,)))
    assert (await register(PushRequest("m", (file,), open=True))).manifest.sealed is None


async def content(data: bytes) -> AsyncIterator[bytes]:
    yield data
