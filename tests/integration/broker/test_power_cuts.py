"""What services remember may be newer than what their broker has after a power cut."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from support.brokers import cuts
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, first, new_job, row

from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.leases import LeaseBucket
from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.service import Dispatcher
from tether.errors import BrokerUnavailable
from tether.gateway_http import gateway

Restartable = tuple[Broker, Services]


async def test_a_route_that_the_broker_lost_is_written_again_for_gateways_that_start_later(
    restartable: Restartable,
) -> None:
    broker, running = restartable
    names = running.bus.names
    earlier = await cuts.keep(broker, names.bucket_stream("assign"), names.bucket_stream("routes"))
    assert await running.bus.wait_connected(10)
    served = await running.push("bump", models.add())
    await cuts.cut(broker, earlier)
    key = names.version_key("bump", 1)
    bucket = KvBucket(running.bus, "routes")

    async def written() -> bool:
        with suppress(BrokerUnavailable):
            return await bucket.get(key) is not None
        return False

    await wait_until(written, "the route is written again", 20)
    later = await running.stack.enter_async_context(gateway.running(running.settings, running.home))
    await wait_until(lambda: later.catalog.workers(served) == ("worker-1",), "a new gateway knows the worker")
    inputs = new_job(served, row(1)).inputs
    answer = await later.infer(served, TENANT, inputs, (), request_id="test", timeout_s=10)
    assert np.array_equal(first(answer), row(2))


async def test_a_worker_whose_epoch_the_broker_lost_is_believed_by_a_dispatcher_that_starts_later(
    restartable: Restartable, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, running = restartable
    served = await running.push("bump", models.add())
    assign = running.bus.names.bucket_stream("assign")
    earlier = await cuts.keep(broker, assign)
    worker = running.workers[0]
    assert await worker._bus.wait_connected(10)
    await wait_until(lambda: running.dispatcher is not None and running.dispatcher.streams.ok, "streams are there")
    await worker.register()
    assert running.dispatcher is not None
    epoch = running.dispatcher._epochs["worker-1"]

    async def nothing(_: Dispatcher) -> None:
        """The dispatcher that remembers writes nothing again."""

    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "_write_again", nothing)
        await cuts.cut(broker, earlier)
        assert await running.bus.wait_connected(10)
        async with dispatcher_service.running(running.settings, running.home) as fresh:
            assert fresh._epochs["worker-1"] < epoch
            await wait_until(lambda: "worker-1" in fresh._workers, "its heartbeats count")
            assert fresh._epochs["worker-1"] == epoch
    assert np.array_equal(await running.infer(served, row(1)), row(2))


async def test_no_two_owners_of_a_partition_have_had_the_same_epoch(restartable: Restartable) -> None:
    broker, running = restartable
    assert running.modelstore is not None
    bucket = LeaseBucket(running.modelstore._bus)
    stream = running.bus.names.bucket_stream("leases")
    earlier = await cuts.keep(broker, stream)
    assert await running.modelstore._bus.wait_connected(10)
    before = await bucket.read_all()
    first = await bucket.transfer(9, "one", 0)
    await cuts.cut(broker, earlier)
    assert await running.modelstore._bus.wait_connected(10)

    async def gone() -> bool:
        with suppress(BrokerUnavailable):
            return 9 not in (await bucket.read_all()).leases and 9 not in before.leases
        return False

    await wait_until(gone, "the lease was lost")
    second = await bucket.transfer(9, "other", 0)
    assert first is not None
    assert second is not None
    assert second.epoch > first.epoch
