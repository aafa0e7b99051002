"""The end of chunks that no version names, beside pushes; and the proof of those that versions do name."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.brokers.stores import MB, Platform, alter, parts, platform_on
from support.models import models

from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.manifest import Change, ChangeRequest, Manifest, ModelFile, PushRequest
from tether.errors import Conflict, CorruptChunk, ModelNotFound, TetherError, Unavailable
from tether.model.ownership import DEFAULT_TENANT
from tether.modelstore.records.registry import Registry
from tether.modelstore.registration import model_changes
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.model_files import download
from tether.storage.object_meta import ChunkState
from tether.storage.upload import upload
from tether.wire import codec


@dataclasses.dataclass
class Kept:
    """A platform, and a keeper beside its model store for whom every chunk is old enough at once."""

    platform: Platform
    keeper: ChunkCollector
    store: ChunkLifecycle
    registry: Registry

    async def delete(self, version: int, *, model: str = "m") -> None:
        body = codec.encode(
            ChangeRequest(Change.DELETE_VERSION, model, version=version, tenant=DEFAULT_TENANT, admin=True)
        )
        await ask_owner(
            self.platform.bus,
            model_changes.ENDPOINT,
            0,
            MessageType.CHANGE,
            body,
            answers=MessageType.CHANGED,
            timeout=30,
        )

    async def states(self) -> dict[str, ChunkState]:
        return {digest: chunk.state for digest, chunk in (await self.store.snapshot()).chunks.items()}


@asynccontextmanager
async def keeping(platform: Platform, *, unreferenced_ttl_s: float = 0.0) -> AsyncIterator[Kept]:
    settings = dataclasses.replace(
        platform.broker.settings, unreferenced_ttl_s=unreferenced_ttl_s, gc_grace_s=0.0, scrub_mb_s=10_000.0
    )
    async with connect(settings, platform.broker.home, "modelstore") as bus:
        registry = Registry(bus)
        keyring = ModelKeyring(bus, platform.broker.home, every=True)
        yield Kept(
            platform, ChunkCollector(bus, registry, keyring), ChunkLifecycle(bus, bus.names.chunk_bucket("m")), registry
        )


@pytest.fixture
async def kept(broker: Broker) -> AsyncIterator[Kept]:
    async with platform_on(broker) as platform, keeping(platform) as made:
        yield made


def chunks_of(*manifests: Manifest) -> set[str]:
    return {digest for manifest in manifests for file in manifest.files for digest in file.chunks}


async def two_versions(kept: Kept) -> tuple[Manifest, Manifest]:
    first = (await kept.platform.push(models.padded(6 * MB, seed=1))).manifest
    second = (await kept.platform.push(models.padded(6 * MB, seed=2))).manifest
    return first, second


async def test_what_only_a_deleted_version_named_is_removed_in_two_steps(kept: Kept, tmp_path: Path) -> None:
    first, second = await two_versions(kept)
    alone = chunks_of(first) - chunks_of(second)
    assert await kept.keeper.collect() == 0
    assert set((await kept.states()).values()) == {ChunkState.ALIVE}
    before = (await kept.store.snapshot()).stored_bytes
    await kept.delete(1)
    assert await kept.keeper.collect() == 0
    states = await kept.states()
    assert {digest for digest, state in states.items() if state is ChunkState.UNREFERENCED} == alone
    assert set(await kept.platform.store().missing(sorted(alone))) == alone
    await download(kept.platform.store(), first.files[0], tmp_path / "still-there")
    sizes = dict(first.files[0].sized_chunks())
    assert await kept.keeper.collect() == sum(sizes[digest] for digest in alone)
    assert set(await kept.states()) == chunks_of(second)
    assert (await kept.store.snapshot()).stored_bytes < before - 5 * MB
    await download(kept.platform.store(), second.files[0], tmp_path / "whole")
    assert await kept.keeper.collect() == 0


async def test_a_version_made_of_chunks_that_were_put_away_keeps_them(kept: Kept, tmp_path: Path) -> None:
    """Its push was told that the store has them, before they were found unreferenced."""
    file, _ = await kept.platform.upload(models.padded(6 * MB))
    assert await kept.platform.store().missing(file.chunks) == []
    await kept.keeper.collect()
    assert set((await kept.states()).values()) == {ChunkState.UNREFERENCED}
    await kept.platform.register(PushRequest("m", (file,)))
    assert set((await kept.states()).values()) == {ChunkState.ALIVE}
    assert await kept.keeper.collect() + await kept.keeper.collect() == 0
    await download(kept.platform.store(), file, tmp_path / "whole")


async def test_a_push_that_comes_too_late_is_told_so_and_the_next_one_works(kept: Kept) -> None:
    content = models.padded(6 * MB)
    file, stored = await kept.platform.upload(content)
    assert [await kept.keeper.collect(), await kept.keeper.collect()] == [0, stored]
    with pytest.raises(CorruptChunk, match="push the model again"):
        await kept.platform.register(PushRequest("m", (file,)))
    assert await kept.platform.manifest("m", 1) is None
    assert (await kept.platform.push(content)).manifest.version == 1


async def test_a_referenced_chunk_is_brought_back(kept: Kept) -> None:
    """Whatever put it away: its data was never touched."""
    first, _ = await two_versions(kept)
    digest = first.files[0].chunks[0]
    chunk = (await kept.store.snapshot()).chunks[digest]
    assert await kept.store.write_state(chunk, ChunkState.UNREFERENCED)
    assert await kept.keeper.collect() == 0
    again = (await kept.store.snapshot()).chunks[digest]
    assert (again.state, again.size) == (ChunkState.ALIVE, chunk.size)


async def test_chunks_of_uploads_under_way_are_kept(broker: Broker) -> None:
    async with platform_on(broker) as platform, keeping(platform, unreferenced_ttl_s=3600.0) as kept:
        await platform.upload(models.padded(6 * MB))
        assert await kept.keeper.collect() + await kept.keeper.collect() == 0
        assert set((await kept.states()).values()) == {ChunkState.ALIVE}


async def test_data_without_a_meta_message_is_collected(kept: Kept) -> None:
    """An upload that died between the two."""
    digest = "ab" * 32
    await alter(kept.platform, digest, b"x" * 1000)
    assert (await kept.states()) == {digest: ChunkState.BARE}
    assert [await kept.keeper.collect(), await kept.keeper.collect()] == [0, 1000]
    assert await kept.states() == {}


async def test_a_chunk_that_is_stored_anew_meanwhile_is_not_removed(kept: Kept, tmp_path: Path) -> None:
    content = models.padded(6 * MB)
    file, _ = await kept.platform.upload(content)
    await kept.keeper.collect()
    marked = (await kept.store.snapshot()).chunks
    await kept.platform.upload(content)
    assert [await kept.store.remove(chunk) for chunk in marked.values()] == [0] * len(marked)
    assert set((await kept.states()).values()) == {ChunkState.ALIVE}
    await download(kept.platform.store(), file, tmp_path / "whole")


async def test_data_that_is_younger_than_its_mark_stays(kept: Kept) -> None:
    """A push has stored the data anew and is about to write the meta message."""
    file, _ = await kept.platform.upload(models.padded(6 * MB))
    await kept.keeper.collect()
    digest = file.chunks[0]
    marked = (await kept.store.snapshot()).chunks[digest]
    found = await kept.store.read(digest)
    assert found is not None
    await alter(kept.platform, digest, found.data)
    assert await kept.store.remove(marked) == 0
    again = (await kept.store.snapshot()).chunks[digest]
    assert (again.state, again.has_data) == (ChunkState.UNREFERENCED, True)
    assert again.sequence > marked.sequence


async def test_a_keeper_that_died_on_the_way_is_finished_by_the_next(kept: Kept) -> None:
    file, stored = await kept.platform.upload(models.padded(6 * MB))
    await kept.keeper.collect()
    chunk = (await kept.store.snapshot()).chunks[file.chunks[0]]
    assert await kept.store.write_state(chunk, ChunkState.LEAVING)
    with pytest.raises(CorruptChunk):
        await kept.platform.register(PushRequest("m", (file,)))
    # the push brought the others back before it came to this one
    assert await kept.keeper.collect() + await kept.keeper.collect() == stored
    assert await kept.states() == {}


async def test_two_keepers_at_once_remove_everything_once(kept: Kept, tmp_path: Path) -> None:
    _, second = await two_versions(kept)
    await kept.delete(1)
    chunks = (await kept.store.snapshot()).chunks
    alone = sum(chunks[digest].size for digest in await orphans(kept))
    total = 0
    async with keeping(kept.platform) as other:
        for _ in range(3):
            # a mark that one made is old enough for the other at once
            total += sum(await asyncio.gather(*(one.keeper.collect() for one in (kept, other, kept, other))))
    assert total == alone
    assert set(await kept.states()) == chunks_of(second)
    await download(kept.platform.store(), second.files[0], tmp_path / "whole")


async def orphans(kept: Kept) -> set[str]:
    named = chunks_of(*await kept.registry.manifests())
    return set(await kept.states()) - named


async def test_nothing_is_collected_while_a_manifest_cannot_be_read(kept: Kept) -> None:
    await two_versions(kept)
    bus = kept.platform.bus
    async with connect(bus.settings, kept.platform.broker.home, "modelstore") as writer:
        await KvBucket(writer, "models").put("other.1", b"not a frame")
    await kept.delete(1)
    with pytest.raises(Unavailable, match=r"'other\.1' is unreadable"):
        await kept.keeper.collect()
    assert set((await kept.states()).values()) == {ChunkState.ALIVE}
    await kept.delete(1, model="other")
    await kept.keeper.collect()
    assert await kept.keeper.collect() > 5 * MB


async def test_a_pass_finds_what_is_altered_or_missing_and_a_push_mends_it(kept: Kept) -> None:
    content = models.padded(8 * MB)
    manifest = (await kept.platform.push(content)).manifest
    assert await kept.keeper.scrub() == 0
    altered, lost, *_ = manifest.files[0].chunks
    await alter(kept.platform, altered, b"evil")
    assert await remove_data(kept, lost)
    assert await kept.keeper.scrub() == 2
    state = await kept.keeper.state()
    assert {chunk.digest: chunk.versions for chunk in state.damaged} == dict.fromkeys((altered, lost), ("m:1",))
    assert await kept.platform.store().missing(manifest.files[0].chunks) == [altered, lost]
    assert (await kept.platform.push(content)).created is False
    assert await kept.keeper.scrub() == 0
    assert (await kept.keeper.state()).damaged == ()


async def remove_data(kept: Kept, digest: str) -> bool:
    """What a broken disk does."""
    found = await kept.store.read(digest)
    assert found is not None
    path = f"STREAM.MSG.DELETE.{kept.platform.bus.names.object_stream(kept.store.bucket)}"
    async with connect(kept.platform.bus.settings, kept.platform.broker.home, "modelstore") as bus:
        return bool((await bus.api(path, {"seq": found.sequence}))["success"])


async def test_a_chunk_that_was_blamed_and_is_right_counts_again(kept: Kept) -> None:
    manifest = (await kept.platform.push(models.padded(6 * MB))).manifest
    await kept.platform.store().discard(manifest.files[0].chunks[0])
    assert len((await kept.keeper.state()).damaged) == 1
    assert await kept.keeper.scrub() == 0


class Storm:
    """Pushes, deletions, uploads that break off, and pulls, in an order that a seed decides."""

    def __init__(self, kept: Kept, seed: int, scratch: Path) -> None:
        self._kept = kept
        self._random = random.Random(seed)
        self._scratch = scratch
        self.pushed = self.deleted = self.broken = self.pulled = self.late = 0

    def _content(self) -> bytes:
        return models.padded(3 * MB, seed=self._random.randrange(5))

    async def act(self, model: str) -> None:
        kind = self._random.choice(("push", "push", "delete", "delete", "break", "pull"))
        await getattr(self, f"_{kind}")(model)

    async def _push(self, model: str) -> None:
        content = self._content()
        for _ in range(10):
            try:
                await self._kept.platform.push(content, model=model)
            except (CorruptChunk, Unavailable):
                self.late += 1
            else:
                self.pushed += 1
                return
        raise AssertionError("a push never got through")

    async def _versions(self, model: str) -> list[Manifest]:
        return [manifest for manifest in await self._kept.registry.manifests() if manifest.name == model]

    async def _delete(self, model: str) -> None:
        for manifest in (await self._versions(model))[:-1]:
            try:
                await self._kept.delete(manifest.version, model=model)
                self.deleted += 1
            except (Conflict, ModelNotFound):
                continue

    async def _break(self, model: str) -> None:
        content = self._content()
        end = self._random.randrange(len(content))

        async def body() -> AsyncIterator[bytes]:
            async for part in parts(content[:end]):
                yield part
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            await upload(self._kept.platform.bus, self._kept.platform.store(model), body(), limit=1 << 30)
        self.broken += 1

    async def _pull(self, model: str) -> None:
        for manifest in await self._versions(model):
            try:
                await self.whole(manifest)
                self.pulled += 1
            except TetherError:
                left = {left.version for left in await self._versions(model)}
                assert manifest.version not in left, "a version that is there could not be pulled"

    async def whole(self, manifest: Manifest) -> None:
        file: ModelFile = manifest.files[0]
        await download(self._kept.platform.store(), file, self._scratch / f"{manifest.name}-{manifest.version}")


@pytest.mark.parametrize("seed", [1, 2])
async def test_collections_beside_pushes_deletions_and_broken_uploads(
    start_broker: StartBroker, tmp_path: Path, seed: int
) -> None:
    often = {"unreferenced_ttl_s": 6.0, "gc_grace_s": 6.0, "gc_interval_s": 0.05, "scrub_interval_s": 0.5}
    async with (
        start_broker(**often) as broker,
        platform_on(broker, modelstores=2) as platform,
        keeping(platform) as kept,
    ):
        storm = Storm(kept, seed, tmp_path)

        async def act_on(model: str) -> None:
            for _ in range(14):
                await storm.act(model)

        await asyncio.gather(*(act_on(model) for model in ("m", "n", "o")))
        assert min(storm.pushed, storm.deleted, storm.broken, storm.pulled) > 0, vars(storm)

        async def nothing_left() -> bool:
            return not await orphans(kept)

        await wait_until(nothing_left, "every chunk that no version names is gone", 60)
        left = await kept.registry.manifests()
        for manifest in left:
            await storm.whole(manifest)
        assert set(await kept.states()) == chunks_of(*left)
        assert (await kept.keeper.state()).damaged == ()
