"""A gateway is ready when what it needs works, and names what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest
from support.brokers.brokers import Broker, wait_until
from support.brokers.operators import reconfigure
from support.models import models
from support.platform.services import Services, row, services

from tether.bus.session import connect
from tether.domain.manifest import ModelRef
from tether.errors import BrokerUnavailable, StorageFull
from tether.gateway_http.readiness import BROKER, INFERENCE, JOBS, RESULTS, STORAGE
from tether.process import operations_server
from tether.streams.broker_storage import BrokerStorage
from tether.streams.updates import update_streams

ALL = {BROKER, INFERENCE, JOBS, RESULTS, STORAGE}


@pytest.fixture
async def running(broker: Broker) -> AsyncIterator[Services]:
    async with services(broker) as started:
        await wait_until(lambda: failing(started) == {}, "everything was tried")
        yield started


def failing(running: Services) -> dict[str, str]:
    return {name: state for name, state in running.gateway.checks().items() if state != "ok"}


async def test_every_dependency_is_tried_and_named(running: Services) -> None:
    assert set(running.gateway.checks()) == ALL
    assert running.gateway.readiness.infers()
    _, _, exposed = operations_server.answer("/metrics", running.gateway.checks)
    for name in ALL:
        assert f'tether_dependency_ready{{dependency="{name}"}} 1.0'.encode() in exposed


async def test_tries_leave_nothing_behind(running: Services) -> None:
    await running.gateway.readiness.probe()

    async def gone() -> bool:
        assert running.dispatcher is not None
        names, kept = running.bus.names, 0
        for stream in (names.infer_stream(0), names.jobs_stream(0), names.results_stream):
            kept += (await running.dispatcher._bus.api(f"STREAM.INFO.{stream}"))["state"]["messages"]
        return kept == 0

    await wait_until(gone, "what was written to try is gone by itself")


@pytest.mark.parametrize(("name", "infers"), [(JOBS, True), (RESULTS, True), (INFERENCE, False)])
async def test_a_stream_that_takes_nothing_is_noticed_without_any_request(
    running: Services, name: str, infers: bool
) -> None:
    names = running.bus.names
    stream = {JOBS: names.jobs_stream(0), RESULTS: names.results_stream, INFERENCE: names.infer_stream(0)}[name]
    served = await running.push("add", models.add())
    await wait_until(lambda: running.gateway.ready(served, "shared"), "a worker answers")
    await elsewhere(running, stream)
    await wait_until(lambda: set(failing(running)) == {name}, f"{name} is missing", 20)
    assert "no stream takes" in failing(running)[name]
    assert running.gateway.readiness.infers() is infers
    assert running.gateway.ready(served, "shared") is infers
    async with connect(running.settings, running.home, "admin") as admin:
        assert await update_streams(admin, running.settings) == {stream: ["subjects"]}
    await wait_until(lambda: failing(running) == {}, "an administrator has mended it", 30)


async def elsewhere(running: Services, stream: str) -> None:
    """Let a stream take other subjects than its own."""
    await reconfigure(running.home, running.settings, stream, subjects=[f"elsewhere.{stream}"])


async def test_without_a_broker_nothing_is_ready_and_with_it_everything(running: Services, broker: Broker) -> None:
    assert broker.server is not None
    served = await running.push("add", models.add())
    await broker.server.kill()
    await wait_until(lambda: set(failing(running)) == ALL - {STORAGE}, "the broker is missed")
    assert not running.gateway.readiness.infers()
    assert not running.gateway.ready(served, "shared")
    await broker.server.start()
    await wait_until(lambda: failing(running) == {}, "everything works again", 30)
    await wait_until(lambda: running.gateway.ready(served, "shared"), "the model is ready again", 30)
    await running.infer(served, row(1.0))


async def test_a_model_is_ready_when_a_worker_says_so_and_not_for_a_route_alone(running: Services) -> None:
    served = await running.push("add", models.add())
    ref = ModelRef("add", 1)
    heard = running.gateway.heartbeats
    await wait_until(lambda: heard.holds("worker-1", ref), "its heartbeat names the version")
    assert not heard.holds("worker-1", ModelRef("add", 2))
    assert not heard.holds("worker-2", ref)
    frame = heard._beats["worker-1"].frame
    assert heard._verify("worker-1", frame) == {ref}
    assert not heard._verify("worker-1", frame[:-1] + bytes([frame[-1] ^ 1])), "nobody signed this one"
    assert not heard._verify("worker-2", frame), "this is another worker's"
    await wait_until(lambda: running.gateway.ready(served, "shared"), "it is ready")


async def test_where_nothing_is_known_of_the_disk_nothing_is_refused(running: Services) -> None:
    storage = BrokerStorage(
        dataclasses.replace(running.settings, nats_store_dir="", nats_monitor_url=""), running.bus.clock
    )
    storage.require()
    error = BrokerUnavailable("no answer")
    assert storage.explained(error) is error
    storage.full = "the broker's disk is full"
    assert isinstance(storage.explained(error), StorageFull)
