"""While a cluster elects leaders nobody takes what is sent: it is sent again, and what cannot be repeated is not."""

from __future__ import annotations

import asyncio

import pytest
from support.brokers.brokers import Broker
from support.brokers.operators import reconfigure

from tether.bus.errors import ApiError, translate, undone
from tether.bus.session import connect
from tether.errors import BrokerUnavailable, QueueFull
from tether.streams.layout import ensure_platform

PASSING = (
    (503, 10008, "JetStream system temporarily unavailable"),
    (503, 10004, "incomplete results"),
    (400, 10005, "no suitable peers for placement"),
    (500, 10007, "JetStream cluster not assigned to this server"),
    (500, 10009, "JetStream cluster can not handle request"),
    (500, 10118, "stream is offline"),
    (500, 10119, "consumer is offline"),
    (409, 10158, "duplicate message id is in process"),
    (503, 10163, "expected last sequence per subject temporarily unavailable"),
    (500, 10194, "stream is offline: unsupported"),
    (500, 10195, "consumer is offline: unsupported"),
)


@pytest.mark.parametrize(("status", "code", "text"), PASSING)
def test_what_a_cluster_answers_while_servers_are_away_passes(status: int, code: int, text: str) -> None:
    assert type(translate(ApiError(status, code, text))) is BrokerUnavailable
    answer = f'{{"error":{{"code":{status},"err_code":{code},"description":"{text}"}},"stream":"S","seq":0}}'
    assert undone(answer.encode(), None)


def test_what_was_stored_or_refused_is_not_sent_again() -> None:
    assert undone(b"", {"Status": "503"})
    assert not undone(b'{"stream":"S","seq":7}', None)
    assert not undone(b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"seq":0}', None)
    assert not undone(
        b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"seq":0}', None
    )
    assert not undone(b'"error" and no JSON', None)


async def test_a_stream_that_comes_within_the_time_gets_what_was_sent_before_it_was_there(broker: Broker) -> None:
    async with (
        connect(broker.settings, broker.home, "dispatcher") as dispatcher,
        connect(broker.settings, broker.home, "gateway") as gateway,
    ):
        key = gateway.names.bucket_key("tenants", "acme")
        stream = gateway.names.bucket_stream("tenants")
        sent = asyncio.create_task(gateway.publish_acked(key, b"value", timeout=20))
        read = asyncio.create_task(gateway.direct_get(stream, key, timeout=20))
        batch = asyncio.create_task(dispatcher.direct_batch(stream, [key], timeout=20))
        with pytest.raises(BrokerUnavailable):
            await gateway.publish_acked(key, b"nobody takes it", timeout=0.2)
        assert not any(task.done() for task in (sent, read, batch))
        await ensure_platform(dispatcher, broker.settings)
        assert (await sent).sequence == 1
        await asyncio.gather(read, batch)
        stored = await gateway.direct_get(stream, key)
        assert stored is not None
        assert stored.data == b"value"


async def test_a_full_stream_is_not_waited_for(broker: Broker) -> None:
    async with (
        connect(broker.settings, broker.home, "dispatcher") as dispatcher,
        connect(broker.settings, broker.home, "gateway") as gateway,
    ):
        await ensure_platform(dispatcher, broker.settings)
        name = gateway.names.bucket_stream("tenants")
        await reconfigure(broker.home, broker.settings, name, max_msgs=1)
        await gateway.publish_acked(gateway.names.bucket_key("tenants", "a"), b"1", timeout=60)
        with pytest.raises(QueueFull):
            await asyncio.wait_for(
                gateway.publish_acked(gateway.names.bucket_key("tenants", "b"), b"2", timeout=60), 20
            )
