"""Chunks that the store lost come back from the cache of a worker that holds a version they belong to, or are reported."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest
from support.brokers import audits
from support.brokers.brokers import Broker, wait_until
from support.brokers.stores import MB
from support.models import models
from support.platform import encryption
from support.platform.services import ASKER, Services, services

from tether.bus.bus import Message
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.crypto.model_encryption import ChunkSeal
from tether.crypto.payload_encryption import new_data_key
from tether.domain.chunking import digest_of
from tether.domain.manifest import Change, Manifest, ModelRef
from tether.errors import PermissionDenied
from tether.modelstore.records.registry import Registry
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.process import metrics
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.chunk_repair import ChunkLenders
from tether.storage.object_meta import ChunkState
from tether.worker.files.chunk_cache import as_it_is
from tether.worker.files.version_files import WorkerFiles


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workers that were asked for a chunk, once for each; comes before ``running``."""
    names: list[str] = []
    lend = WorkerFiles.lend

    def noted(files: WorkerFiles, name: str) -> bytes | None:
        names.append(files._bus.signer.name)
        return lend(files, name)

    monkeypatch.setattr(WorkerFiles, "lend", noted)
    return names


@pytest.fixture
async def running(broker: Broker) -> AsyncIterator[Services]:
    quick = dataclasses.replace(broker.settings, scrub_mb_s=10_000.0)
    async with services(dataclasses.replace(broker, settings=quick)) as made:
        yield made


async def cached(running: Services, *, encrypt: bool) -> Manifest:
    """A version whose chunks the worker keeps."""
    manifest = (await running.push("m", models.padded(8 * MB), encrypt=encrypt)).manifest
    cache = running.workers[0].holder.files.cache
    chunks = set(manifest.files[0].chunks)
    await wait_until(lambda: cache.held(chunks) == chunks, "the worker keeps the chunks", 30)
    return manifest


def keeper(running: Services) -> ChunkCollector:
    assert running.modelstore is not None
    return running.modelstore.keeper


async def spoil(running: Services, manifest: Manifest) -> tuple[str, str, str]:
    """One chunk is altered, one loses its data, and of one nothing is left."""
    altered, lost, gone, *_ = manifest.files[0].chunks
    names, bucket = running.bus.names, running.bus.names.partition_bucket(manifest.partition)
    await running.bus.publish_acked(names.object_chunk(bucket, altered), b"evil")
    async with connect(running.settings, running.home, "modelstore") as bus:
        store, stream = ChunkLifecycle(bus, bucket), names.object_stream(bucket)
        metas = (await store.snapshot()).chunks
        for digest in (lost, gone):
            found = await store.read(digest)
            assert found is not None
            await bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": found.sequence})
        await bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": metas[gone].sequence})
    return altered, lost, gone


def counted(outcome: str) -> float:
    return float(metrics.REPAIRED_CHUNKS.labels(outcome)._value.get())


async def told(running: Services, outcome: str) -> set[str]:
    """What the audit log says of repairs, once all three are in it."""
    found: set[str] = set()

    async def is_told() -> bool:
        entries = await audits.entries(running.bus, running.home)
        rows = [entry.entry for entry in entries if entry.entry.action == "repair chunk"]
        found.update(row.detail for row in rows if row.outcome == outcome and (row.model, row.version) == ("m", 1))
        return len(found) == 3

    await wait_until(is_told, "the audit log has three entries")
    return found


async def content(running: Services, manifest: Manifest) -> bytes:
    """The version's file as a gateway reads it."""
    plain = running.gateway.encrypted_models.plain(manifest)
    async with aclosing(running.gateway.encrypted_models.store(manifest).get(plain.files[0].chunks)) as parts:
        return b"".join([part async for part in parts])


both_forms = pytest.mark.parametrize("encrypt", [False, True])


@both_forms
async def test_what_is_damaged_comes_back_from_a_workers_cache(running: Services, encrypt: bool) -> None:
    """And what the meta message says of a chunk is true of its data, whatever nonce the worker closed it with."""
    manifest, before = await cached(running, encrypt=encrypt), counted("repaired")
    chunks = await spoil(running, manifest)
    assert len((await keeper(running).state()).damaged) == 2
    assert await keeper(running).scrub() == 0
    async with connect(running.settings, running.home, "modelstore") as bus:
        store = ChunkLifecycle(bus, bus.names.partition_bucket(manifest.partition))
        assert await store.missing(manifest.files[0].chunks) == []
        for chunk in (await store.snapshot()).chunks.values():
            found = await store.read(chunk.digest)
            assert found is not None
            assert (chunk.stored_digest, chunk.size) == (digest_of(found.data), len(found.data))
    assert await content(running, manifest) == models.padded(8 * MB)
    assert counted("repaired") - before == 3
    assert await told(running, "ok") == {f"{digest} from worker-1" for digest in chunks}


@both_forms
async def test_a_worker_sends_nothing_that_its_disk_has_altered(running: Services, encrypt: bool) -> None:
    manifest, before = await cached(running, encrypt=encrypt), counted("not_held")
    chunks = await spoil(running, manifest)
    cache = running.workers[0].holder.files.cache
    assert cache.held(chunks) == set(chunks)
    cache._guarded(lambda db: db.put([(digest, b"evil") for digest in chunks], []))
    assert await keeper(running).scrub() == 3
    assert {chunk.digest for chunk in (await keeper(running).state()).damaged} == set(chunks)
    assert counted("not_held") - before == 3
    assert await told(running, "corrupt_chunk") == {f"{d} is damaged, and no worker has it" for d in chunks}


def kept(running: Services, name: str) -> bytes:
    found = running.workers[0].holder.files.cache.read(name, as_it_is)
    assert found is not None
    return found


def seal(running: Services, manifest: Manifest) -> ChunkSeal:
    assert manifest.sealed is not None
    key = running.gateway.encrypted_models.keyring.known("m", manifest.sealed.key_id)
    assert key is not None
    return ChunkSeal(key, "m")


Lie = Callable[[Services, Manifest, str], bytes]


def another_chunk(running: Services, manifest: Manifest, name: str) -> bytes:
    return kept(running, next(other for other in manifest.files[0].chunks if other != name))


def nonsense(running: Services, manifest: Manifest, name: str) -> bytes:
    del running, manifest, name
    return b"something else"


def in_the_clear(running: Services, manifest: Manifest, name: str) -> bytes:
    return seal(running, manifest).decrypt(name, kept(running, name))


def of_another_key(running: Services, manifest: Manifest, name: str) -> bytes:
    """The right chunk, closed for the right name with a key that the model does not have."""
    return ChunkSeal(new_data_key(1), "m").encrypt(name, in_the_clear(running, manifest, name))


def other_content(running: Services, manifest: Manifest, name: str) -> bytes:
    """What only a holder of the key can make."""
    return seal(running, manifest).encrypt(name, b"evil")


SEALED_LIES = (nonsense, another_chunk, in_the_clear, of_another_key, other_content)
LIES = [(False, nonsense), (False, another_chunk), *((True, lie) for lie in SEALED_LIES)]


@pytest.mark.parametrize(("encrypt", "lie"), LIES)
async def test_what_a_worker_sends_is_not_believed(
    broker: Broker, encrypt: bool, lie: Lie, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running: Services
    manifest: Manifest
    monkeypatch.setattr(WorkerFiles, "lend", lambda _, name: lie(running, manifest, name))
    async with services(broker) as running:
        manifest = await cached(running, encrypt=encrypt)
        chunks = await spoil(running, manifest)
        assert await keeper(running).scrub() == 3
        assert {chunk.digest for chunk in (await keeper(running).state()).damaged} == set(chunks)
    assert [getattr(record, "action", "") for record in caplog.records].count("chunk_refused") == 3


@both_forms
async def test_nobody_is_asked_but_who_holds_the_version(running: Services, encrypt: bool) -> None:
    """Whoever is told of a digest may read that chunk, so it is told to nobody else."""
    manifest = await cached(running, encrypt=encrypt)
    others: list[Message] = []

    async def heard(message: Message) -> None:
        others.append(message)

    async with (
        connect(running.settings, running.home, "worker-1") as holder,
        connect(running.settings, running.home, "worker-2") as other,
    ):
        await other.subscribe(other.names.wanted("worker-2"), heard)
        with pytest.raises(PermissionDenied):
            await other.subscribe(other.names.wanted("worker-1"), heard)
        requests: list[Message] = []

        async def also_heard(message: Message) -> None:
            requests.append(message)

        await holder.subscribe(holder.names.wanted("worker-1"), also_heard)
        await spoil(running, manifest)
        assert await keeper(running).scrub() == 0
        await wait_until(lambda: len(requests) == 3, "the holder is asked for each")
        await other.flush()
        assert others == []


async def test_a_chunk_of_an_encrypted_model_travels_as_the_worker_keeps_it(running: Services) -> None:
    manifest = await cached(running, encrypt=True)
    sent: dict[str, bytes] = {}

    async def heard(message: Message) -> None:
        envelope = bus.verify_frame(message.data, message.subject, MessageType.CHUNK)
        assert envelope is not None
        sent[envelope.header.message_id] = envelope.body

    async with connect(running.settings, running.home, "modelstore") as bus:
        await bus.subscribe(bus.names.chunk("worker-1"), heard)
        await bus.flush()
        chunks = await spoil(running, manifest)
        assert await keeper(running).scrub() == 0
        await wait_until(lambda: len(sent) == 3, "three chunks were sent")
        store = ChunkLifecycle(bus, bus.names.partition_bucket(manifest.partition))
        stored = {name: found.data for name in chunks if (found := await store.read(name)) is not None}
    assert sent == stored == {name: kept(running, name) for name in chunks}
    for name in chunks:
        plain = in_the_clear(running, manifest, name)
        assert plain[:64] not in sent[name]
        assert plain[-64:] not in sent[name]


async def test_a_worker_lends_nothing_of_an_encrypted_model_that_it_does_not_hold(running: Services) -> None:
    """It could not tell whether that is right; and its cache keeps what it was asked for."""
    manifest = await cached(running, encrypt=True)
    files, name = running.workers[0].holder.files, manifest.files[0].chunks[0]
    assert files.lend(name) == kept(running, name)
    files.release(ModelRef("m", 1))
    before = kept(running, name)
    assert files.lend(name) is None
    assert kept(running, name) == before


async def test_a_worker_whose_key_was_withdrawn_is_not_asked(asked: list[str], running: Services) -> None:
    """It cannot load the version, so no route says that it holds it."""
    encryption.believe(running, encryption.without("worker-2"))
    manifest = await cached(running, encrypt=True)
    second = await running.start_worker("worker-2")
    await wait_until(lambda: bool(second.holder.failed()), "it says that it cannot load", 30)
    await spoil(running, manifest)
    assert await keeper(running).scrub() == 0
    assert asked == ["worker-1"] * 3


async def test_a_model_store_without_the_key_asks_nobody(asked: list[str], running: Services) -> None:
    """It would have to believe whatever a worker sends; damage is reported all the same."""
    manifest = await cached(running, encrypt=True)
    chunks = await spoil(running, manifest)
    async with connect(running.settings, running.home, "modelstore") as bus:
        lenders = ChunkLenders(bus)
        async with lenders.listening():
            unread = ModelKeyring(bus, running.home, every=True)
            assert await ChunkCollector(bus, Registry(bus), unread, lenders=lenders).scrub() == 3
    assert {chunk.digest for chunk in (await keeper(running).state()).damaged} == set(chunks)
    assert asked == []
    assert await keeper(running).scrub() == 0, "the one that has the key mends it"
    assert asked == ["worker-1"] * 3


async def test_a_chunk_of_the_key_before_is_not_stored_under_the_name_of_the_newer(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: Services
    names: dict[str, str]
    monkeypatch.setattr(WorkerFiles, "lend", lambda _, name: kept(running, names[name]))
    async with services(broker) as running:
        old = await cached(running, encrypt=True)
        assert await running.gateway.encrypted_models.ask(Change.REKEY, "m", ASKER) == 2

        def current() -> Manifest:
            return running.gateway.catalog.resolve("m", "1").manifest

        await wait_until(lambda: current().sealed != old.sealed, "it is stored under the new key", 40)
        new = current()
        names = dict(zip(new.files[0].chunks, old.files[0].chunks, strict=True))
        chunks = await spoil(running, new)
        assert await keeper(running).scrub() == 3
        assert {chunk.digest for chunk in (await keeper(running).state()).damaged} == set(chunks)


async def test_a_chunk_that_somebody_stores_meanwhile_is_left_to_him(running: Services) -> None:
    """Whoever comes second writes neither data nor meta message, so that the two are of one mind."""
    manifest = await cached(running, encrypt=True)
    name, names = manifest.files[0].chunks[0], running.bus.names
    bucket = names.partition_bucket(manifest.partition)
    async with connect(running.settings, running.home, "modelstore") as bus:
        store = ChunkLifecycle(bus, bucket)
        chunk, before = (await store.snapshot()).chunks[name], await store.read(name)
        assert before is not None
        assert await store.restore(chunk, b"first", before)
        assert not await store.restore(chunk, b"second", before), "there is other data by now"
        assert not await store.restore(chunk, b"third", None)
        found = await store.read(name)
        assert found is not None
        assert found.data == b"first"
        now = (await store.snapshot()).chunks[name]
        assert (now.state, now.size, now.stored_digest) == (ChunkState.ALIVE, 5, digest_of(b"first"))


async def test_without_a_worker_damage_is_reported(broker: Broker) -> None:
    async with services(broker, workers=0) as running:
        manifest = (await running.push("m", models.padded(8 * MB), workers=0)).manifest
        chunks = await spoil(running, manifest)
        assert await keeper(running).scrub() == 3
        assert {chunk.digest for chunk in (await keeper(running).state()).damaged} == set(chunks)
