"""Pushing models through a real broker: chunks, versions, aliases, and what is left when something breaks."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from nats.js import JetStreamContext
from nats.js.errors import ObjectNotFoundError
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.brokers.operators import operator_of
from support.brokers.stores import MB, Platform, alter, noise, parts, platform_on
from support.models import models

from tether.bus.key_value.bucket import KvBucket
from tether.bus.pending_requests import fail_on_disconnect
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.chunking import Cutter, digest_of
from tether.domain.manifest import Manifest, ModelFile, PushRequest
from tether.errors import (
    BrokerUnavailable,
    CorruptChunk,
    InvalidRequest,
    ModelRejected,
    PayloadTooLarge,
    SubjectMismatch,
    TetherError,
)
from tether.process.os_process import send
from tether.storage.model_files import download, fetch_model, intact, open_manifest
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform
from tether.wire import codec


@pytest.fixture
async def platform(broker: Broker) -> AsyncIterator[Platform]:
    async with platform_on(broker) as made:
        yield made


async def test_a_push_makes_version_1_and_the_same_again_makes_nothing(platform: Platform) -> None:
    first = await platform.push(models.add(1.0))
    again = await platform.push(models.add(1.0))
    changed = await platform.push(models.add(2.0))
    assert [(a.manifest.version, a.created) for a in (first, again, changed)] == [(1, True), (1, False), (2, True)]
    assert changed.aliases == {"latest": 2}
    assert await platform.manifest("m", 1) == first.manifest
    assert first.manifest.platform == "onnxruntime_onnx"
    assert first.manifest.batching.max_batch_size == 512
    alias = await platform.latest("m")
    assert (alias.version, alias.revision, [move.version for move in alias.previous]) == (2, 2, [1])


async def test_the_same_file_with_other_batching_is_a_new_version(platform: Platform) -> None:
    await platform.push(models.add())
    changed = await platform.push(models.add(), max_batch_size=8)
    assert (changed.manifest.version, changed.manifest.batching.max_batch_size) == (2, 8)


async def test_only_what_changed_is_stored(platform: Platform) -> None:
    content = noise(60 * MB + 17)
    file, stored = await platform.upload(content)
    assert stored == len(content) == file.size
    overwritten = content[: 20 * MB] + noise(300_000, seed=9) + content[20 * MB + 300_000 :]
    assert 300_000 <= (await platform.upload(overwritten))[1] <= 8 * MB
    inserted = content[: 30 * MB] + b"a few bytes in the middle" + content[30 * MB :]
    assert (await platform.upload(inserted))[1] <= 4 * MB
    assert (await platform.upload(content))[1] == 0


async def test_simultaneous_pushes_get_versions_of_their_own(start_broker: StartBroker) -> None:
    async with start_broker() as broker, platform_on(broker, modelstores=2) as platform:
        answers = await asyncio.gather(*(platform.push(models.add(float(n))) for n in range(6)))
        assert sorted(answer.manifest.version for answer in answers) == [1, 2, 3, 4, 5, 6]
        assert (await platform.latest("m")).version == 6


async def test_a_dotted_name_is_a_model_of_its_own(platform: Platform) -> None:
    await platform.push(models.add(1.0), model="a.b")
    await platform.push(models.add(2.0), model="a")
    assert (await platform.push(models.add(3.0), model="a.b")).manifest.version == 2


async def test_an_interrupted_upload_is_invisible_and_resumed(platform: Platform) -> None:
    content = noise(90 * MB)
    (first, _), *_ = Cutter().cut((content[: 20 * MB],))

    async def is_stored() -> bool:
        return not await platform.store().missing([first])

    async def broken() -> AsyncIterator[bytes]:
        async for part in parts(content[: 60 * MB]):
            yield part
        await wait_until(is_stored, "a chunk is stored before the upload breaks")
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await upload(platform.bus, platform.store(), broken(), limit=1 << 30)
    assert await platform.manifest("m", 1) is None
    _, stored = await platform.upload(content)
    assert stored < len(content)


@pytest.mark.parametrize(
    ("content", "limit", "error"), [(b"", 100, InvalidRequest), (b"x" * 101, 100, PayloadTooLarge)]
)
async def test_a_body_that_cannot_be_a_model_is_refused_at_once(
    platform: Platform, content: bytes, limit: int, error: type[TetherError]
) -> None:
    with pytest.raises(error):
        await platform.upload(content, limit=limit)


async def test_a_refused_model_leaves_no_version(platform: Platform) -> None:
    with pytest.raises(ModelRejected, match="not an ONNX model"):
        await platform.push(b"GIF89a" * 1000)
    with pytest.raises(ModelRejected, match="no batch axis"):
        await platform.push(models.identity("FP32", (4,)), max_batch_size=4)
    file, _ = await platform.upload(models.add())
    with pytest.raises(InvalidRequest, match="max_delay_ms"):
        await platform.register(PushRequest("m", (file,), max_delay_ms=-1.0))
    assert await platform.manifest("m", 1) is None


async def test_what_cannot_be_proven_is_batched_only_when_that_is_declared(platform: Platform) -> None:
    alone = (await platform.push(models.unknown_operator())).manifest.batching
    assert (alone.max_batch_size, alone.basis) == (0, "")
    assert "operator Det (output 'y') may mix rows" in alone.reason
    assert "--max-batch-size" in alone.reason
    declared = await platform.push(models.unknown_operator(), max_batch_size=4)
    assert (declared.manifest.version, declared.manifest.batching.max_batch_size) == (2, 4)
    assert declared.manifest.batching.basis == "declared"


async def test_what_a_trial_run_shows_to_mix_rows_cannot_be_declared(platform: Platform) -> None:
    alone = (await platform.push(models.over_batch())).manifest.batching
    assert (alone.max_batch_size, alone.basis) == (0, "")
    assert "operator Softmax (output 'y') works across the rows" in alone.reason
    with pytest.raises(
        ModelRejected, match=r"max_batch_size is 4, but .* among 6 rows differ by .* push it with max_batch_size 0"
    ):
        await platform.push(models.over_batch(), max_batch_size=4)
    assert (await platform.push(models.over_batch(), max_batch_size=0)).manifest.batching.max_batch_size == 0


async def test_an_altered_chunk_is_never_served_and_mended_by_the_next_push(platform: Platform, tmp_path: Path) -> None:
    content = models.padded(12 * MB)
    file, _ = await platform.upload(content)
    await alter(platform, file.chunks[1], b"evil")
    with pytest.raises(CorruptChunk, match=file.chunks[1]):
        await download(platform.store(), file, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CorruptChunk):
        await platform.register(PushRequest("m", (file,)))
    _, stored = await platform.upload(content)
    assert stored == file.sizes[1]
    assert (await platform.register(PushRequest("m", (file,)))).manifest.version == 1


async def test_a_missing_chunk_is_a_corrupt_one(platform: Platform, tmp_path: Path) -> None:
    digest = digest_of(b"never stored")
    file = ModelFile("model.onnx", 12, digest, (digest,))
    with pytest.raises(CorruptChunk, match="not in the store"):
        await download(platform.store(), file, tmp_path / "model.onnx")


async def test_chunks_that_are_each_right_but_not_the_file_are_refused(platform: Platform, tmp_path: Path) -> None:
    content = noise(5 * MB)
    file, _ = await platform.upload(content)
    digest = hashlib.sha256(content).hexdigest()
    swapped = ModelFile(file.path, file.size, digest, file.chunks[::-1], file.sizes[::-1])
    with pytest.raises(CorruptChunk, match="do not make up"):
        await download(platform.store(), swapped, tmp_path / "model.onnx")
    with pytest.raises(CorruptChunk, match="do not make up"):
        await platform.register(PushRequest("m", (swapped,)))
    assert await download(platform.store(), file, tmp_path / "model.onnx") == digest


async def test_the_store_finds_out_the_digest_of_a_file_that_was_pushed_without(platform: Platform) -> None:
    content = models.padded(3 * MB)
    file, _ = await platform.upload(content)
    assert file.digest == ""
    pushed = (await platform.register(PushRequest("m", (file,)))).manifest
    assert pushed.files[0].digest == hashlib.sha256(content).hexdigest()
    known = msgspec.structs.replace(file, digest=pushed.files[0].digest)
    again = await platform.register(PushRequest("m", (known,)))
    assert (again.created, again.manifest) == (False, pushed)


async def test_a_cache_is_proven_at_every_use(platform: Platform, tmp_path: Path) -> None:
    content = models.padded(2 * MB)
    manifest = (await platform.push(content)).manifest
    folders = await asyncio.gather(*(fetch_model(platform.bus, platform.store(), manifest, tmp_path) for _ in range(4)))
    assert len(set(folders)) == 1
    target = folders[0] / "model.onnx"
    assert target.read_bytes() == content
    target.write_bytes(content[:-1] + b"!")
    await fetch_model(platform.bus, platform.store(), manifest, tmp_path)
    assert target.read_bytes() == content
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(content)
    target.unlink()
    target.symlink_to(elsewhere)
    assert not intact(target, manifest.files[0])
    await fetch_model(platform.bus, platform.store(), manifest, tmp_path)
    assert not target.is_symlink()
    (folders[0] / f".model.onnx.{2**22 + 1}.ab").write_bytes(b"half a file of a process that was killed")
    await fetch_model(platform.bus, platform.store(), manifest, tmp_path)
    assert [path.name for path in folders[0].iterdir()] == ["model.onnx"]


async def test_a_manifest_counts_only_under_its_own_key(platform: Platform) -> None:
    manifest = (await platform.push(models.add())).manifest
    names, bus = platform.bus.names, platform.bus
    frame = await KvBucket(bus, "models").get(names.version_key("m", 1))
    assert frame is not None
    assert open_manifest(bus.verifier, names, "m.1", frame) == manifest
    with pytest.raises(SubjectMismatch):
        open_manifest(bus.verifier, names, "m.2", frame)


async def test_what_may_be_asked_again_fails_with_the_connection_and_all_else_waits_on(embedded_broker: Broker) -> None:
    server = embedded_broker.server
    assert server is not None
    async with connect(embedded_broker.settings, embedded_broker.home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, embedded_broker.settings)
    async with connect(embedded_broker.settings, embedded_broker.home, "modelstore") as bus:
        send(server.pid, signal.SIGSTOP)
        status = Path(f"/proc/{server.pid}/stat")
        await wait_until(
            lambda: status.read_text().rpartition(")")[2].split()[0] == "T", "nothing is answered any more"
        )
        subject = f"DIRECT.GET.{bus.names.object_stream(bus.names.partition_bucket(0))}"

        async def again() -> object:
            with fail_on_disconnect():
                return await bus.api(subject, {"seq": 1}, timeout=60)

        asked, patient = asyncio.create_task(again()), asyncio.create_task(bus.api(subject, {"seq": 1}, timeout=60))
        await wait_until(lambda: len(bus._calls) == 2, "both are asked")
        send(server.pid, signal.SIGKILL)
        with pytest.raises(BrokerUnavailable, match="lost during the request"):
            async with asyncio.timeout(20):
                await asked
        assert not patient.done()
        patient.cancel()
        await asyncio.gather(patient, return_exceptions=True)


async def test_a_push_outlives_a_restart_of_the_broker(embedded_broker: Broker) -> None:
    content = models.padded(60 * MB)
    server = embedded_broker.server
    assert server is not None
    async with platform_on(embedded_broker) as platform:
        await platform.push(models.add())
        half = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            sent = 0
            async for part in parts(content):
                sent += len(part)
                if sent > len(content) // 2:
                    half.set()
                yield part

        task = asyncio.ensure_future(upload(platform.bus, platform.store(), body(), limit=1 << 30))
        await half.wait()
        await server.kill()
        await server.start()
        file, _ = await task
        await wait_until(lambda: platform.bus.connected, "the gateway is connected again")
        answer = await platform.register(PushRequest("m", (file,)))
        assert answer.manifest.version == 2
        assert answer.manifest.files[0].digest == hashlib.sha256(content).hexdigest()


async def test_a_model_store_that_died_before_the_alias_repairs_it_at_its_next_start(broker: Broker) -> None:
    async with platform_on(broker) as platform:
        await platform.push(models.add(1.0))
        second = (await platform.push(models.add(2.0))).manifest
        assert second.version == 2
    async with connect(broker.settings, broker.home, "modelstore") as bus:
        key, subject = "m.3", bus.names.bucket_key("models", "m.3")
        orphan = Manifest(
            **{name: getattr(second, name) for name in second.__struct_fields__ if name != "version"}, version=3
        )
        frame = bus.signer.sign_envelope(MessageType.MANIFEST, subject, codec.encode(orphan))
        assert await KvBucket(bus, "models").create(key, frame)
    async with platform_on(broker) as platform:

        async def is_moved() -> bool:
            return (await platform.latest("m")).version == 3

        await wait_until(is_moved, "the next model store moves what was left behind")


async def test_the_clients_own_object_store_reads_our_chunks(platform: Platform) -> None:
    content = noise(5 * MB)
    file, _ = await platform.upload(content)
    await platform.store().put(again(content[: file.sizes[0]]))
    async with operator_of(platform.broker) as bus:
        objects = await JetStreamContext(bus._client).object_store(platform.bus.names.chunk_bucket("m"))
        start = 0
        for digest, size in file.sized_chunks():
            chunk = content[start : start + size]
            start += size
            found = await objects.get(digest)
            assert found.data == chunk
            assert (found.info.size, found.info.chunks, found.info.nuid) == (len(chunk), 1, digest)
        assert {info.name for info in await objects.list()} == set(file.chunks)
        await platform.store().discard(file.chunks[1])
        with pytest.raises(ObjectNotFoundError):
            await objects.get(file.chunks[1])


async def again(chunk: bytes) -> AsyncIterator[tuple[str, bytes]]:
    """A chunk as ``put`` takes it."""
    yield digest_of(chunk), chunk
