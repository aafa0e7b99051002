"""Several model stores share the partitions of the store, and take over what one of them had that died or stood still."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import helper, numpy_helper
from support.brokers import audits
from support.brokers.brokers import Broker, StartBroker, embedded, wait_until
from support.brokers.stores import Platform, platform_on
from support.models import models
from support.platform.platforms import command, environment

from tether.broker.embedded_server import Binary
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.leases import LeaseBucket, ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType, Role
from tether.domain.chunking import LARGEST, Bytes, Cutter
from tether.domain.manifest import Change, ChangeRequest, Manifest, PushRequest
from tether.domain.partition import Lease
from tether.errors import ConfigError, Unavailable
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.model.ownership import DEFAULT_TENANT
from tether.modelstore import service as modelstore
from tether.modelstore.records.model_configs import ModelConfigStore
from tether.modelstore.records.model_owners import Owners
from tether.modelstore.records.registry import Registry
from tether.modelstore.records.version_metadata import VersionMetadataStore
from tether.modelstore.upkeep.partitions import Partitions
from tether.process.data_dir import Home
from tether.process.os_process import send
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.model_files import download
from tether.streams.layout import ensure_platform
from tether.wire import codec
from tether.wire.subjects import Names

SECOND = "modelstore-2"


def large(seed: int = 0, megabytes: int = 48) -> bytes:
    """A model whose registration takes a moment."""
    weights = np.random.default_rng(seed).standard_normal((megabytes << 9, 512), dtype=np.float32)
    node = helper.make_node("Gather", ["t", "x"], ["y"])
    inputs, outputs = [models.value("x", "INT64", ["n"])], [models.value("y", "FP32", ["n", 512])]
    return models.to_bytes(models.model([node], inputs, outputs, [numpy_helper.from_array(weights, "t")]))


def name_in(platform: Platform, partition: int) -> str:
    return next(name for name in map(chr, range(97, 123)) if platform.bus.names.partition(name) == partition)


async def owners(bus: Bus, partitions: int) -> list[str]:
    leases = [await LeaseBucket(bus).get(number) for number in range(partitions)]
    return [lease.owner if lease is not None else "" for lease in leases]


# in this process


async def test_models_spread_over_the_partitions_and_are_read_from_them(start_broker: StartBroker) -> None:
    async with start_broker(partitions=4) as broker, platform_on(broker) as platform:
        assert len(platform.bus.names.chunk_buckets()) == 4
        for number in range(4):
            name = name_in(platform, number)
            manifest = (await platform.push(models.add(float(number)), model=name)).manifest
            assert manifest.partition == number
            store = ObjectChunkStore(platform.bus, platform.bus.names.partition_bucket(number))
            assert await store.missing(manifest.files[0].chunks) == []
            target = broker.home.root / f"pulled-{number}"
            await download(store, manifest.files[0], target)
            assert target.read_bytes() == models.add(float(number))


async def test_versions_from_before_there_were_partitions_are_still_found(home: Home, nats_binary: Binary) -> None:
    """Their chunks stay where they are; the next version of the same model goes where it belongs by now."""
    name = next(name for name in map(chr, range(97, 123)) if Names(partitions=4).partition(name) == 3)
    async with embedded(home, nats_binary) as broker, platform_on(broker) as platform:
        old = (await platform.push(models.add(1.0), model=name)).manifest
        fields = {key: value for key, value in msgspec.to_builtins(old).items() if key != "partition"}
        async with connect(broker.settings, home, "modelstore") as bus:
            subject = bus.names.bucket_key("models", f"{name}.1")
            frame = bus.signer.sign_envelope(MessageType.MANIFEST, subject, codec.pack(fields))
            await bus.publish_acked(subject, frame)
    async with embedded(home, nats_binary, partitions=4) as grown, platform_on(grown) as platform:
        assert await platform.manifest(name, 1) == old
        assert old.partition == 0
        store = ObjectChunkStore(platform.bus, platform.bus.names.partition_bucket(0))
        assert await store.missing(old.files[0].chunks) == []
        new = (await platform.push(models.add(2.0), model=name)).manifest
        assert (new.version, new.partition) == (2, 3)
    async with embedded(home, nats_binary, partitions=2) as shrunk:
        with pytest.raises(ConfigError, match="'partitions' is 2, but there are versions in 4"):
            async with modelstore.running(shrunk.settings, home):
                pass


async def test_two_stores_share_the_partitions_and_one_has_all_when_the_other_stops(start_broker: StartBroker) -> None:
    async with start_broker(partitions=4, partition_lease_s=3.0) as broker, platform_on(broker) as platform:
        (first,) = set(await owners(platform.bus, 4))
        async with modelstore.running(broker.settings, broker.home):

            async def is_shared() -> bool:
                found = await owners(platform.bus, 4)
                return sorted(map(found.count, set(found) - {""})) == [2, 2]

            await wait_until(is_shared, "each has two partitions", 30)
            pushes = [platform.push(models.add(), model=name_in(platform, number)) for number in range(4)]
            assert [answer.manifest.version for answer in await asyncio.gather(*pushes)] == [1] * 4

        async def is_alone() -> bool:
            return set(await owners(platform.bus, 4)) == {first}

        await wait_until(is_alone, "the first has all of them again", 30)
        answer = await platform.push(models.add(2.0), model=name_in(platform, 3))
        assert answer.manifest.version == 2


async def test_a_store_that_is_not_the_owner_writes_nothing(broker: Broker) -> None:
    async with platform_on(broker) as platform:
        manifest = (await platform.push(models.add())).manifest
    async with audits.writer(broker, "modelstore") as (bus, audit):
        idle, old = Partitions(bus, "idle", nothing), Lease(0, 1, "idle")
        registry = Registry(bus, lambda: idle.check(old))
        owners = Owners(bus, registry, audit)
        before = {name: await KvBucket(bus, name).entries() for name in ("models", "configs")}

        def build(version: int) -> Manifest:
            return msgspec.structs.replace(manifest, version=version, platform="other")

        for attempt in (
            lambda: registry.add("m", build, admitted),
            lambda: registry.move("m", "latest", 7),
            lambda: registry.delete("m", 1),
            lambda: ModelConfigStore(bus, registry, audit, VersionMetadataStore(bus, registry, audit), owners).given(
                manifest, {"instances": 2}, "key:test"
            ),
            lambda: owners.handle(ChangeRequest(Change.GRANT, "m", tenant=DEFAULT_TENANT, grantee="b", right=1)),
            lambda: owners.claim(PushRequest("new", manifest.files, tenant=DEFAULT_TENANT)),
        ):
            with pytest.raises(Unavailable, match="belongs to another model store"):
                await attempt()
        assert {name: await KvBucket(bus, name).entries() for name in before} == before


async def test_a_lease_changes_hands_once(broker: Broker) -> None:
    async with platform_on(broker) as platform, connect(broker.settings, broker.home, "modelstore") as bus:
        leases = LeaseBucket(bus)
        sequence, lease = (await leases.read_all()).leases[0]
        assert lease is not None
        taken = [await leases.transfer(0, owner, sequence) for owner in ("a", "b")]
        assert [taken[0] and taken[0].owner, taken[1]] == ["a", None]
        assert taken[0] is not None
        assert taken[0].epoch > lease.epoch
        assert await LeaseBucket(platform.bus).get(0) == taken[0]


async def test_a_request_waits_for_an_owner_and_says_when_there_is_none(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.bus.key_value.leases.PATIENCE_S", 1.0)
    async with connect(broker.settings, broker.home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
    async with connect(broker.settings, broker.home, "gateway") as bus:
        body = codec.encode(ChangeRequest(Change.SHOW_STORE, ""))
        with pytest.raises(Unavailable, match="no model store owns partition 0"):
            await ask_owner(bus, "changeModel", 0, MessageType.CHANGE, body, answers=MessageType.CHANGED)


@asynccontextmanager
async def nothing(_: Lease) -> AsyncIterator[None]:
    yield


async def admitted(_: Manifest) -> None:
    """Every version is."""


# processes


@dataclass
class Stores:
    """Two model stores as processes of their own."""

    platform: Platform
    processes: dict[str, subprocess.Popen[bytes]]

    @property
    def home(self) -> Home:
        return self.platform.broker.home

    def log(self, name: str) -> str:
        return (self.home.root / f"{name}.log").read_text()

    async def owner(self, partition: int) -> str:
        """The identity that looks after a partition; empty when nobody does."""
        lease = await LeaseBucket(self.platform.bus).get(partition)
        names = [name for name in self.processes if lease and lease.owner and self.folder(name, lease.owner).is_dir()]
        return names[0] if names else ""

    def folder(self, name: str, instance: str) -> Path:
        return self.home.cache(name) / instance

    def registering(self, name: str) -> bool:
        """Whether a model's file is there, so that it is being fetched or looked at."""
        return any(self.home.cache(name).glob("*/push-*/*"))


@asynccontextmanager
async def stores(home: Home, binary: Binary) -> AsyncIterator[Stores]:
    keyset_editor.add(home, RootKey(home.root_key), SECOND, Role.MODELSTORE)
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(embedded(home, binary, partitions=2, partition_lease_s=3.0))
        platform = await stack.enter_async_context(platform_on(broker, modelstores=0))
        more = {
            "TETHER_NATS_URL": broker.url,
            "TETHER_PARTITIONS": "2",
            "TETHER_PARTITION_LEASE_S": "3",
            "TETHER_OPS_PORT": "0",
        }
        running = Stores(platform, {})
        for name in ("modelstore", SECOND):
            log = stack.enter_context((home.root / f"{name}.log").open("wb"))
            running.processes[name] = subprocess.Popen(
                command("modelstore", "--name", name), env=environment(home, more), stdout=log, stderr=log
            )
            stack.callback(ended, running.processes[name])

        async def is_shared() -> bool:
            return {await running.owner(0), await running.owner(1)} == {"modelstore", SECOND}

        await wait_until(is_shared, "each has one partition", 60)
        yield running


def ended(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGCONT, signal.SIGTERM):
        send(process.pid, number)
    try:
        process.wait(40)
    finally:
        process.kill()
        process.wait()


async def test_a_push_survives_the_death_of_its_model_store(home: Home, nats_binary: Binary) -> None:
    """Killed while it looks at a model; the chunks that are stored are not sent again."""
    async with stores(home, nats_binary) as running:
        platform, model = running.platform, name_in(running.platform, 1)
        content = large()
        (*half,) = Cutter().cut((content[: len(content) // 2],))
        sent = await platform.store(model).put(again(half))
        owner = await running.owner(1)
        file, stored = await platform.upload(content, model=model)
        assert stored <= len(content) - sent + LARGEST
        push = asyncio.create_task(platform.register(PushRequest(model, (file,))))
        await wait_until(lambda: running.registering(owner), "it looks at the model", 60)
        send(running.processes[owner].pid, signal.SIGKILL)
        killed = asyncio.get_running_loop().time()

        async def is_taken() -> bool:
            return await running.owner(1) not in ("", owner)

        await wait_until(is_taken, "the other has the partition", 30)
        assert asyncio.get_running_loop().time() - killed < 10
        answer = await push
        assert (answer.manifest.version, answer.aliases) == (1, {"latest": 1})
        other = await platform.push(models.add(), model=name_in(platform, 0))
        assert other.manifest.version == 1


async def test_a_model_store_that_stood_still_finds_itself_deposed(home: Home, nats_binary: Binary) -> None:
    """Stopped while it looks at a model, which the next owner makes a version of; then it goes on, and writes nothing."""
    async with stores(home, nats_binary) as running:
        platform, model = running.platform, name_in(running.platform, 1)
        owner = await running.owner(1)
        file, _ = await platform.upload(large(), model=model)
        push = asyncio.create_task(platform.register(PushRequest(model, (file,))))
        await wait_until(lambda: running.registering(owner), "it looks at the model", 60)
        send(running.processes[owner].pid, signal.SIGSTOP)
        assert (await push).manifest.version == 1
        assert (await platform.push(models.add(), model=model)).manifest.version == 2
        send(running.processes[owner].pid, signal.SIGCONT)
        await wait_until(lambda: "push refused" in running.log(owner), "it goes on", 60)
        assert "belongs to another model store" in running.log(owner)
        assert sorted(await KvBucket(platform.bus, "models").entries()) == [f"{model}.1", f"{model}.2"]
        assert (await platform.latest(model)).version == 2

        async def is_shared() -> bool:
            return {await running.owner(0), await running.owner(1)} == {"modelstore", SECOND}

        await wait_until(is_shared, "it has its share again", 30)
        assert (await platform.push(models.add(3.0), model=name_in(platform, 0))).manifest.version == 1


async def again(chunks: list[tuple[str, Bytes]]) -> AsyncIterator[tuple[str, Bytes]]:
    for chunk in chunks:
        yield chunk
