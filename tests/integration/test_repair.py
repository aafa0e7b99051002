"""Pieces that the store lost come back from the cache of a worker that holds a version they belong to, or are reported."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import audits
import models
import pytest
from brokers import Broker, wait_until
from services import Services, services
from stores import MB

from tether import metrics
from tether.bus.connection import Bus, Message
from tether.bus.keeping import PieceKeeper
from tether.errors import PermissionDenied
from tether.model import Manifest
from tether.modelstore.keeper import Keeper
from tether.worker.files import WorkerFiles


@pytest.fixture
async def running(broker: Broker) -> AsyncIterator[Services]:
    quick = dataclasses.replace(broker.settings, scrub_mb_s=10_000.0)
    async with services(dataclasses.replace(broker, settings=quick)) as made:
        yield made


async def cached(running: Services) -> Manifest:
    """A version whose pieces the worker keeps."""
    manifest = (await running.push("m", models.padded(8 * MB))).manifest
    cache = running.workers[0].holder.files.cache
    chunks = set(manifest.files[0].chunks)
    await wait_until(lambda: cache.held(chunks) == chunks, "the worker keeps the pieces", 30)
    return manifest


def keeper(running: Services) -> Keeper:
    assert running.modelstore is not None
    return running.modelstore.keeper


async def spoil(running: Services, manifest: Manifest) -> tuple[str, str, str]:
    """One piece is altered, one loses its data, and of one nothing is left."""
    altered, lost, gone, *_ = manifest.files[0].chunks
    names, bucket = running.bus.names, running.bus.names.partition_bucket(manifest.partition)
    await running.bus.publish_acked(names.object_chunk(bucket, altered), b"evil")
    async with Bus.connect(running.settings, running.home, "modelstore") as bus:
        store, stream = PieceKeeper(bus, bucket), names.object_stream(bucket)
        metas = (await store.snapshot()).pieces
        for digest in (lost, gone):
            found = await store.read(digest)
            assert found is not None
            await bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": found.sequence})
        await bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": metas[gone].sequence})
    return altered, lost, gone


def counted(outcome: str) -> float:
    return float(metrics.REPAIRED_PIECES.labels(outcome)._value.get())


async def told(running: Services, outcome: str) -> set[str]:
    """What the audit log says of repairs, once all three are in it."""
    found: set[str] = set()

    async def is_told() -> bool:
        entries = await audits.entries(running.bus, running.home)
        rows = [entry.entry for entry in entries if entry.entry.action == "repair piece"]
        found.update(row.detail for row in rows if row.outcome == outcome and (row.model, row.version) == ("m", 1))
        return len(found) == 3

    await wait_until(is_told, "the audit log has three entries")
    return found


async def test_what_is_damaged_comes_back_from_a_workers_cache(running: Services) -> None:
    manifest, before = await cached(running), counted("repaired")
    pieces = await spoil(running, manifest)
    assert len((await keeper(running).state()).damaged) == 2
    assert await keeper(running).scrub() == 0
    async with Bus.connect(running.settings, running.home, "modelstore") as bus:
        store = PieceKeeper(bus, bus.names.partition_bucket(manifest.partition))
        assert await store.missing(manifest.files[0].chunks) == []
        read = [piece async for piece in store.get(manifest.files[0].chunks)]
    assert b"".join(read) == models.padded(8 * MB)
    assert counted("repaired") - before == 3
    assert await told(running, "ok") == {f"{digest} from worker-1" for digest in pieces}


async def test_a_worker_sends_nothing_that_its_disk_has_altered(running: Services) -> None:
    manifest, before = await cached(running), counted("not_held")
    pieces = await spoil(running, manifest)
    cache = running.workers[0].holder.files.cache
    assert cache.held(pieces) == set(pieces)
    cache._guarded(lambda db: db.put([(digest, b"evil") for digest in pieces], []))
    assert await keeper(running).scrub() == 3
    assert {piece.digest for piece in (await keeper(running).state()).damaged} == set(pieces)
    assert counted("not_held") - before == 3
    assert await told(running, "corrupt_chunk") == {f"{d} is damaged, and no worker has it" for d in pieces}


async def test_what_a_worker_sends_is_not_believed(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerFiles, "lend", lambda *_: b"something else")
    async with services(broker) as running:
        pieces = await spoil(running, await cached(running))
        assert await keeper(running).scrub() == 3
        assert {piece.digest for piece in (await keeper(running).state()).damaged} == set(pieces)


async def test_nobody_is_asked_but_who_holds_the_version(running: Services) -> None:
    """Whoever is told of a digest may read that piece, so it is told to nobody else."""
    manifest, asked = await cached(running), []

    async def heard(message: Message) -> None:
        asked.append(message)

    async with (
        Bus.connect(running.settings, running.home, "worker-1") as holder,
        Bus.connect(running.settings, running.home, "worker-2") as other,
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
        assert asked == []


async def test_without_a_worker_damage_is_reported(broker: Broker) -> None:
    async with services(broker, workers=0) as running:
        manifest = (await running.push("m", models.padded(8 * MB), workers=0)).manifest
        pieces = await spoil(running, manifest)
        assert await keeper(running).scrub() == 3
        assert {piece.digest for piece in (await keeper(running).state()).damaged} == set(pieces)
