"""Lanes of hundreds of versions: those in which somebody waits are made first, and after a restart only what was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.brokers.brokers import Broker

from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.dispatcher.lanes import version_lanes as lanes_module
from tether.dispatcher.lanes.version_lanes import A_PART, VersionLanes
from tether.domain.job import SHARED, Lane, LaneKind, Priority
from tether.domain.manifest import ModelRef
from tether.errors import BrokerUnavailable, TetherError
from tether.streams.lane_admin import consumers_of
from tether.streams.layout import ensure_platform, ensure_streams, lanes_of, streams

VERSIONS = 300
MODELS = {SHARED: tuple(ModelRef(f"m{number:03}", 1) for number in range(VERSIONS))}
REGIONS = ("local",)
LAST_INFER = Lane(LaneKind.INFER, f"m{VERSIONS - 1}", 1)
LAST_JOBS = Lane(LaneKind.JOB, f"m{VERSIONS - 1}", 1, priority=Priority.LOW)


class Watched(Bus):
    """A connection that notes which consumers it asks for, and does not reach the stream ``away``."""

    away = ""

    def note(self) -> list[str]:
        self.asked: list[str] = []
        return self.asked

    async def api(self, path: str, body: object | None = None, *, timeout: float = 5.0) -> dict[str, object]:
        if self.away and f".{self.away}" in path:
            raise BrokerUnavailable(f"no answer on '{path}' in time")
        if path.startswith("CONSUMER.CREATE."):
            self.asked.append(path.split(".")[3])
        return await super().api(path, body, timeout=timeout)


@asynccontextmanager
async def dispatcher(broker: Broker) -> AsyncIterator[Watched]:
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        bus.__class__ = Watched
        assert isinstance(bus, Watched)
        bus.note()
        yield bus


async def put(broker: Broker, *lanes: Lane) -> None:
    """Let a message wait in each of ``lanes``, as a gateway does that asks before there is a consumer."""
    async with connect(broker.settings, broker.home, "gateway") as gateway:
        for lane in lanes:
            await gateway.publish_acked(gateway.names.lane(lane), b"somebody waits")


async def made(bus: Bus, stream: str) -> set[Lane]:
    return await consumers_of(bus, stream)


async def test_lanes_in_which_somebody_waits_are_made_first_and_infer_lanes_before_jobs_lanes(
    embedded_broker: Broker,
) -> None:
    async with dispatcher(embedded_broker) as bus:
        await ensure_platform(bus, embedded_broker.settings)
        await put(embedded_broker, LAST_INFER, LAST_JOBS)
        infer, jobs = bus.names.infer_stream(0), bus.names.jobs_stream(0)
        lanes = VersionLanes(bus)
        assert not await lanes.ensure(MODELS, REGIONS)
        assert bus.asked[0] == bus.names.lane_consumer(LAST_INFER)
        assert len(await made(bus, infer)) == A_PART
        assert await made(bus, jobs) == set()
        asked = bus.note()
        assert not await lanes.ensure(MODELS, REGIONS)
        assert len(await made(bus, infer)) == VERSIONS
        assert asked[VERSIONS - A_PART] == bus.names.lane_consumer(LAST_JOBS)
        while not await lanes.ensure(MODELS, REGIONS):
            pass
        assert len(await made(bus, jobs)) == 3 * VERSIONS


async def test_after_a_restart_only_what_the_broker_lost_is_made(embedded_broker: Broker) -> None:
    server = embedded_broker.server
    assert server is not None
    async with dispatcher(embedded_broker) as bus:
        await ensure_platform(bus, embedded_broker.settings)
        lanes = VersionLanes(bus)
        while not await lanes.ensure(MODELS, REGIONS):
            pass
        await server.kill()
        await server.start()
        assert await bus.wait_connected(10)
        lanes.reset()
        await ensure_platform(bus, embedded_broker.settings)
        await put(embedded_broker, LAST_INFER)
        asked = bus.note()
        while not await lanes.ensure(MODELS, REGIONS):
            pass
        assert asked[0] == bus.names.lane_consumer(LAST_INFER)
        assert sorted(asked) == sorted(
            bus.names.lane_consumer(lanes_of(ref.model, 1, "local")[0]) for ref in MODELS[SHARED]
        )


async def test_a_dispatcher_that_starts_makes_what_is_missing_before_it_looks_at_what_is_there(
    embedded_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "A_PART", 20)
    old, new = {SHARED: MODELS[SHARED][:30]}, {SHARED: MODELS[SHARED][:40]}
    async with dispatcher(embedded_broker) as bus:
        await ensure_platform(bus, embedded_broker.settings)
        before = VersionLanes(bus)
        while not await before.ensure(old, REGIONS):
            pass
        asked = bus.note()
        await VersionLanes(bus).ensure(new, REGIONS)
        missing = [bus.names.lane_consumer(lanes_of(ref.model, 1, "local")[0]) for ref in new[SHARED][30:]]
        assert sorted(asked[:10]) == sorted(missing)
        there = {bus.names.lane_consumer(lane) for ref in old[SHARED] for lane in lanes_of(ref.model, 1, "local")}
        assert not there & set(asked), "lanes that are there, and as they should be, are left alone"


async def test_a_dispatcher_with_other_settings_brings_lanes_up_to_date(embedded_broker: Broker) -> None:
    one = {SHARED: MODELS[SHARED][:1]}
    async with dispatcher(embedded_broker) as bus:
        await ensure_platform(bus, embedded_broker.settings)
        assert await VersionLanes(bus).ensure(one, REGIONS)
        bus.settings = dataclasses.replace(bus.settings, jobs_ack_wait_s=bus.settings.jobs_ack_wait_s + 1)
        asked = bus.note()
        assert await VersionLanes(bus).ensure(one, REGIONS)
        assert len(asked) == 3
        asked = bus.note()
        assert await VersionLanes(bus).ensure(one, REGIONS)
        assert asked == []


async def test_lanes_of_a_version_that_went_and_comes_back_are_made_again(embedded_broker: Broker) -> None:
    one = {SHARED: MODELS[SHARED][:1]}
    async with dispatcher(embedded_broker) as bus:
        await ensure_platform(bus, embedded_broker.settings)
        lanes = VersionLanes(bus)
        assert await lanes.ensure(one, REGIONS)
        assert await lanes.ensure({SHARED: ()}, REGIONS)
        asked = bus.note()
        assert await lanes.ensure(one, REGIONS)
        assert len(asked) == 4


async def test_a_stream_that_does_not_answer_holds_up_neither_other_streams_nor_their_lanes(
    embedded_broker: Broker,
) -> None:
    one = {SHARED: MODELS[SHARED][:1]}
    settings = embedded_broker.settings
    async with dispatcher(embedded_broker) as bus:
        bus.away = bus.names.infer_stream(0)
        failed = await ensure_streams(bus, streams(bus.names, settings))
        assert set(failed) == {bus.away}
        with pytest.raises(BrokerUnavailable, match=bus.away):
            await ensure_platform(bus, settings)
        with pytest.raises(TetherError, match=bus.away):
            await VersionLanes(bus).ensure(one, REGIONS)
        assert len(await made(bus, bus.names.jobs_stream(0))) == 3
