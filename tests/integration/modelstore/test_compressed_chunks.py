"""Chunks that compress well, on a real broker: stored smaller, and read, proven, mended and fetched like all others."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zstandard
from nats.js import JetStreamContext
from support.brokers.brokers import Broker
from support.brokers.operators import operator
from support.brokers.stores import MB, Platform, noise, parts, platform_on

from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.session import connect
from tether.crypto.model_encryption import ChunkSeal
from tether.crypto.payload_encryption import new_data_key
from tether.domain.chunking import LARGEST, ZSTD
from tether.domain.manifest import ModelFile
from tether.errors import CorruptChunk
from tether.modelstore.records.registry import Registry
from tether.modelstore.upkeep.chunk_collector import ChunkCollector, ReferencedChunk
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.chunk_store import ENCODING, ObjectChunkStore
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.storage.model_files import download
from tether.storage.object_meta import ChunkState
from tether.storage.upload import upload

BUCKET = "TETHER_CHUNKS_0"


@pytest.fixture
async def platform(broker: Broker) -> AsyncIterator[Platform]:
    async with platform_on(broker, modelstores=0) as made:
        yield made


@asynccontextmanager
async def keeping(platform: Platform) -> AsyncIterator[tuple[ChunkCollector, ChunkLifecycle]]:
    settings = dataclasses.replace(platform.broker.settings, unreferenced_ttl_s=0.0, gc_grace_s=0.0)
    async with connect(settings, platform.broker.home, "modelstore") as bus:
        keyring = ModelKeyring(bus, platform.broker.home, every=True)
        yield ChunkCollector(bus, Registry(bus), keyring), ChunkLifecycle(bus, BUCKET)


def weights(size: int, seed: int = 3) -> bytes:
    """bfloat16, of which Zstandard saves about a fifth."""
    return np.random.default_rng(seed).standard_normal(size // 2).astype(ml_dtypes.bfloat16).tobytes()


async def stored(platform: Platform, name: str) -> tuple[bytes, str]:
    """A chunk's data message: its content and what its header says of it."""
    bus = platform.bus
    found = await bus.direct_get(bus.names.object_stream(BUCKET), bus.names.object_chunk(BUCKET, name))
    assert found is not None
    return found.data, found.headers.get(ENCODING, "")


async def whole(store: ObjectChunkStore | SealedChunkStore, file: ModelFile, target: Path) -> bytes:
    await download(store, file, target)
    return target.read_bytes()


async def replace(platform: Platform, name: str, content: bytes, encoding: str = "") -> None:
    bus = platform.bus
    headers = {"Nats-Rollup": "sub", **({ENCODING: encoding} if encoding else {})}
    await bus.publish_acked(bus.names.object_chunk(BUCKET, name), content, headers=headers)


async def test_what_compresses_is_stored_smaller_and_read_as_it_was(platform: Platform, tmp_path: Path) -> None:
    content = weights(6 * MB) + noise(6 * MB)
    file, new = await platform.upload(content)
    assert new == len(content)
    forms = {name: await stored(platform, name) for name in file.chunks}
    assert {encoding for _, encoding in forms.values()} == {"", ZSTD}
    for name, size in file.sized_chunks():
        data, encoding = forms[name]
        assert len(data) <= 0.9 * size if encoding else len(data) == size
    assert sum(len(data) for data, _ in forms.values()) < len(content) - MB
    assert await whole(platform.store(), file, tmp_path / "whole") == content
    assert (await platform.upload(content))[1] == 0


async def test_other_object_stores_read_the_stored_bytes(platform: Platform) -> None:
    """With their size and digest as the meta message has them; unpacked they are the chunk."""
    content = weights(3 * MB)
    file, _ = await platform.upload(content)
    async with operator(platform.broker.home, platform.broker.settings) as bus:
        objects = await JetStreamContext(bus._client).object_store(BUCKET)
        got = [await objects.get(name) for name in file.chunks]
    assert all(one.info.size == len(one.data or b"") for one in got)
    assert b"".join(zstandard.ZstdDecompressor().decompress(one.data or b"") for one in got) == content


async def test_what_was_stored_before_there_was_compression_is_read(platform: Platform, tmp_path: Path) -> None:
    content = weights(MB)
    file, _ = await platform.upload(content)
    offset = 0
    for name, size in file.sized_chunks():
        await replace(platform, name, content[offset : offset + size])
        offset += size
    assert await whole(platform.store(), file, tmp_path / "whole") == content


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"no frame", ZSTD),
        (zstandard.ZstdCompressor(level=1).compress(bytes(64 * MB)), ZSTD),
        (zstandard.ZstdCompressor(level=1).compress(b"evil"), ZSTD),
        (b"evil", "another"),
        (b"evil", ""),
    ],
    ids=["no frame", "a bomb", "another chunk", "an unknown form", "not compressed"],
)
async def test_an_altered_chunk_is_named_found_and_mended(
    platform: Platform, tmp_path: Path, content: bytes, encoding: str
) -> None:
    original = weights(4 * MB)
    file, _ = await platform.upload(original)
    name = file.chunks[1]
    await replace(platform, name, content, encoding)
    with pytest.raises(CorruptChunk) as refused:
        await whole(platform.store(), file, tmp_path / "whole")
    assert refused.value.field == name
    async with keeping(platform) as (keeper, store):
        named = ReferencedChunk(file.sizes[1], ("m:1",))
        await keeper._prove(store, (await store.snapshot()).chunks[name], named)
        assert (await store.snapshot()).chunks[name].state is ChunkState.DAMAGED
        assert (await platform.upload(original))[1] == file.sizes[1]
        await keeper._prove(store, (await store.snapshot()).chunks[name], named)
        assert (await store.snapshot()).chunks[name].state is ChunkState.ALIVE
    assert await whole(platform.store(), file, tmp_path / "whole") == original


async def test_a_file_that_swells_beyond_what_was_signed_is_given_up(platform: Platform, tmp_path: Path) -> None:
    """Each chunk may unpack to 4 MiB; the file ends where its size does."""
    file, _ = await platform.upload(noise(2 * MB))
    for name in file.chunks:
        await replace(platform, name, zstandard.ZstdCompressor(level=1).compress(bytes(LARGEST)), ZSTD)
    with pytest.raises(CorruptChunk):
        await whole(platform.store(), file, tmp_path / "whole")
    assert not list(tmp_path.iterdir())


async def test_an_encrypted_chunk_is_compressed_before_it_is_closed(platform: Platform, tmp_path: Path) -> None:
    content = weights(3 * MB)
    seal = ChunkSeal(new_data_key(1), "m")
    store = SealedChunkStore(platform.bus, BUCKET, seal)
    file, _ = await upload(platform.bus, store, parts(content), limit=1 << 30)
    forms = [await stored(platform, seal.name(digest)) for digest in file.chunks]
    assert {encoding for _, encoding in forms} == {""}
    assert sum(len(data) for data, _ in forms) < 0.9 * len(content)
    assert await whole(store, file, tmp_path / "whole") == content


async def test_a_chunk_that_was_put_away_comes_back_as_it_lies_there(platform: Platform) -> None:
    file, _ = await platform.upload(weights(MB))
    name = file.chunks[0]
    data, _ = await stored(platform, name)
    async with keeping(platform) as (_, store):
        before = (await store.snapshot()).chunks[name]
        assert before.size == len(data)
        await store.write_state(before, ChunkState.UNREFERENCED)
        await store.claim(file.sized_chunks(), fresh_s=0.0)
        after = (await store.snapshot()).chunks[name]
        assert (after.state, after.size, after.stored_digest) == (ChunkState.ALIVE, before.size, before.stored_digest)
    async with operator(platform.broker.home, platform.broker.settings) as bus:
        objects = await JetStreamContext(bus._client).object_store(BUCKET)
        assert (await objects.get(name)).data == data
