"""The NATS adapter against a real server: lanes, results, buckets, requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Self

import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until

from tether.bus import rpc
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.session import connect
from tether.crypto import Envelope, MessageType
from tether.domain.job import Lane
from tether.domain.manifest import Epoch
from tether.errors import BrokerUnavailable, PermissionDenied, QueueFull, TetherError, VersionConflict
from tether.process import metrics
from tether.streams.job_queue import BusQueue, BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.streams.layout import ensure_lane, ensure_platform, lanes_of
from tether.wire import codec


@dataclasses.dataclass
class Buses:
    """One connection for each role."""

    dispatcher: Bus
    gateway: Bus
    worker: Bus
    lane: Lane

    async def enqueue(self, message_id: str, body: bytes = b"") -> None:
        frame = self.gateway.signer.sign_envelope(
            MessageType.INFER, self.gateway.names.lane(self.lane), body, message_id=message_id
        )
        await BusQueue(self.gateway).enqueue(self.lane, frame, message_id=message_id, ttl_s=30)


async def connected(stack: AsyncExitStack, broker: Broker) -> Buses:
    names = ("dispatcher", "gateway", "worker-1")
    one, two, three = [await stack.enter_async_context(connect(broker.settings, broker.home, name)) for name in names]
    await ensure_platform(one, broker.settings)
    lane = lanes_of("a.model", 1, "local")[0]
    await ensure_lane(one, lane, broker.settings)
    return Buses(one, two, three, lane)


@pytest.fixture
async def buses(broker: Broker) -> AsyncIterator[Buses]:
    async with AsyncExitStack() as stack:
        yield await connected(stack, broker)


@pytest.fixture
async def restartable(embedded_broker: Broker) -> AsyncIterator[tuple[Broker, Buses]]:
    async with AsyncExitStack() as stack:
        yield embedded_broker, await connected(stack, embedded_broker)


class Puller:
    """A pull whose deliveries are kept."""

    def __init__(self, bus: Bus, lane: Lane, credit: int) -> None:
        self.got: list[Delivery] = []
        self.pull = LaneConsumer(bus, lane, credit, self._take)

    def _take(self, delivery: Delivery) -> None:
        delivery.on_settled = lambda _: self.pull.release()
        self.got.append(delivery)

    async def wait(self, count: int, timeout_s: float = 10.0) -> list[Delivery]:
        await wait_until(lambda: len(self.got) >= count, f"{count} deliveries", timeout_s)
        return self.got

    async def __aenter__(self) -> Self:
        await self.pull.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pull.stop()


async def pending(bus: Bus, lane: Lane) -> tuple[int, int]:
    """Messages of a lane that wait, and that are delivered but not acknowledged."""
    info = await bus.api(f"CONSUMER.INFO.{bus.names.lane_stream(lane)}.{bus.names.lane_consumer(lane)}")
    return info["num_pending"], info["num_ack_pending"]


async def settled(buses: Buses, expected: tuple[int, int]) -> None:
    """An acknowledgement travels on another connection than the question about it."""

    async def there() -> bool:
        return await pending(buses.dispatcher, buses.lane) == expected

    await wait_until(there, f"the lane holds {expected}")


async def test_a_pull_never_holds_more_than_its_credit(buses: Buses) -> None:
    for number in range(10):
        await buses.enqueue(f"m{number}")
    async with Puller(buses.worker, buses.lane, 2) as puller:
        await puller.wait(2)
        await settled(buses, (8, 2))
        await puller.got[0].ack()
        await puller.wait(3)
        await settled(buses, (7, 2))
        for position in range(1, 10):
            await puller.wait(position + 1)
            await puller.got[position].ack()
        assert [delivery.attempt for delivery in puller.got] == [1] * 10


async def test_the_same_message_id_is_stored_once(buses: Buses) -> None:
    await buses.enqueue("same")
    await buses.enqueue("same")
    assert await pending(buses.dispatcher, buses.lane) == (1, 0)


async def test_what_is_given_back_comes_again_at_once(buses: Buses) -> None:
    await buses.enqueue("m")
    async with Puller(buses.worker, buses.lane, 1) as puller:
        (delivery,) = await puller.wait(1)
        await delivery.give_back()
        await puller.wait(2, timeout_s=1.0)
        assert puller.got[1].attempt == 2
        await puller.got[1].ack()


async def test_what_nobody_settles_comes_again_after_the_ack_wait(buses: Buses) -> None:
    await buses.enqueue("m")
    async with Puller(buses.worker, buses.lane, 2) as puller:
        (delivery,) = await puller.wait(1)
        delivery.abandon()
        await puller.wait(2, timeout_s=5.0)
        assert puller.got[1].attempt == 2
        await puller.got[1].ack()
        await delivery.ack()
        await settled(buses, (0, 0))


async def test_a_pull_goes_on_after_the_broker_was_killed(restartable: tuple[Broker, Buses]) -> None:
    broker, buses = restartable
    assert broker.server is not None
    async with Puller(buses.worker, buses.lane, 2) as puller:
        await buses.enqueue("before")
        await (await puller.wait(1))[0].ack()
        await broker.server.kill()
        await broker.server.start()
        assert await buses.dispatcher.wait_connected(5)
        await ensure_platform(buses.dispatcher, broker.settings)
        await ensure_lane(buses.dispatcher, buses.lane, broker.settings)
        assert await buses.gateway.wait_connected(5)
        await buses.enqueue("after")
        await puller.wait(2, timeout_s=5.0)
        await puller.got[1].ack()


async def test_a_pull_goes_on_when_its_consumer_was_deleted_and_made_anew(buses: Buses) -> None:
    async with Puller(buses.worker, buses.lane, 2) as puller:
        await buses.enqueue("one")
        await (await puller.wait(1))[0].ack()
        names = buses.dispatcher.names
        await buses.dispatcher.api(f"CONSUMER.DELETE.{names.lane_stream(buses.lane)}.{names.lane_consumer(buses.lane)}")
        await buses.enqueue("two")
        await ensure_lane(buses.dispatcher, buses.lane, buses.dispatcher.settings)
        await puller.wait(2, timeout_s=5.0)
        await puller.got[1].ack()


async def fits(buses: Buses, number: int) -> bool:
    try:
        await buses.enqueue(f"m{number}", b"x" * (1 << 20))
    except QueueFull:
        return False
    return True


async def test_a_full_lane_refuses_and_keeps_what_it_has(start_broker: StartBroker) -> None:
    async with start_broker(max_memory_mb=64) as broker, AsyncExitStack() as stack:
        buses = await connected(stack, broker)
        accepted = 0
        while await fits(buses, accepted):
            accepted += 1
        assert 20 < accepted < 40
        assert await pending(buses.dispatcher, buses.lane) == (accepted, 0)


async def test_the_first_result_of_a_job_wins_also_after_a_restart(restartable: tuple[Broker, Buses]) -> None:
    broker, buses = restartable
    assert broker.server is not None
    results = BusResults(buses.worker)
    assert await results.commit("a" * 32, b"first")
    assert not await results.commit("a" * 32, b"second")
    await broker.server.kill()
    await broker.server.start()
    assert await buses.worker.wait_connected(5)
    assert not await results.commit("a" * 32, b"third")
    assert await results.ended(["a" * 32, "b" * 32]) == {"a" * 32}
    assert await BusResults(buses.gateway).find(["a" * 32, "b" * 32]) == {"a" * 32: b"first"}


async def test_many_results_are_found_whatever_their_size(buses: Buses) -> None:
    results = BusResults(buses.worker)
    jobs = [format(number, "032x") for number in range(700)]
    body = b"x" * 30_000
    for start in range(0, 700, 50):
        await asyncio.gather(*[results.commit(job, body) for job in jobs[start : start + 50]])
    assert await results.ended([*jobs, "f" * 32]) == set(jobs)
    found = await BusResults(buses.gateway).find([*jobs, "f" * 32])
    assert set(found) == set(jobs)
    assert set(found.values()) == {body}


async def test_a_denied_publish_says_so_and_names_the_subject(buses: Buses) -> None:
    with pytest.raises(PermissionDenied) as caught:
        await buses.worker.publish_acked(buses.worker.names.lane(buses.lane), b"x")
    assert caught.value.field == buses.worker.names.lane(buses.lane)


async def test_publishing_while_the_broker_is_away_fails_at_once(restartable: tuple[Broker, Buses]) -> None:
    broker, buses = restartable
    assert broker.server is not None
    await broker.server.kill()
    await wait_until(lambda: not buses.gateway.connected, "the gateway noticed")
    with pytest.raises(BrokerUnavailable):
        await buses.enqueue("m")
    await broker.server.start()
    assert await buses.gateway.wait_connected(5)


# buckets


async def test_a_bucket_keeps_creates_and_deletes(buses: Buses) -> None:
    bucket = KvBucket(buses.dispatcher, "assign")
    assert await bucket.get("k") is None
    assert await bucket.create("k", b"1")
    assert not await bucket.create("k", b"2")
    await bucket.put("l", b"3")
    assert await bucket.entries() == {"k": b"1", "l": b"3"}
    await bucket.delete("k")
    assert await bucket.get("k") is None
    assert await bucket.create("k", b"4")
    assert await bucket.entries() == {"k": b"4", "l": b"3"}


async def test_a_watcher_sees_what_is_stored_and_not_what_was_refused(buses: Buses) -> None:
    bucket = KvBucket(buses.dispatcher, "assign")
    seen: dict[str, bytes | None] = {}
    await bucket.put("before", b"0")
    async with bucket.watch(seen.__setitem__):
        assert seen == {"before": b"0"}
        await bucket.put("k", b"1")
        await wait_until(lambda: seen.get("k") == b"1", "the change was seen")
        with pytest.raises(VersionConflict):
            await buses.dispatcher.publish_acked(
                bucket.subject("k"), b"refused", headers={"Nats-Expected-Last-Subject-Sequence": "0"}
            )
        await bucket.put("after", b"2")
        await wait_until(lambda: seen.get("after") == b"2", "the later change was seen")
        assert seen["k"] == b"1"
        await bucket.delete("k")
        await wait_until(lambda: seen["k"] is None, "the deletion was seen")


async def test_a_watcher_is_right_again_within_three_seconds_of_a_restart(restartable: tuple[Broker, Buses]) -> None:
    broker, buses = restartable
    assert broker.server is not None
    bucket = KvBucket(buses.dispatcher, "assign")
    seen: dict[str, bytes | None] = {}
    key = buses.worker.signer.name
    async with KvBucket(buses.worker, "assign").watch(seen.__setitem__, key=key):
        await bucket.put("worker-2", b"of another")
        await bucket.put(key, b"1")
        await wait_until(lambda: seen == {key: b"1"}, "the change was seen")
        await broker.server.kill()
        await broker.server.start()
        assert await buses.dispatcher.wait_connected(5)
        await bucket.put(key, b"2")
        await wait_until(lambda: seen == {key: b"2"}, "the change after the restart was seen", 3.0)


async def test_entries_that_are_unsigned_misdirected_or_of_the_wrong_role_do_not_exist(buses: Buses) -> None:
    bucket = SignedBucket(buses.dispatcher, "assign", MessageType.ASSIGN)
    raw = bucket.raw
    await bucket.put("good", b"body")
    await raw.put("unsigned", b"body")
    await raw.put("copied", (await raw.get("good")) or b"")
    worker = buses.worker.signer.sign_envelope(MessageType.HEARTBEAT, raw.subject("worker"), b"body")
    await raw.put("worker", worker)
    assert await bucket.entries() == {"good": b"body"}


# requests


async def ping(envelope: Envelope) -> bytes:
    return codec.encode(Epoch(len(envelope.body)))


def serving(bus: Bus, handler: rpc.RpcHandler) -> AbstractAsyncContextManager[None]:
    return rpc.serve(
        bus, "registerWorker", accepts=MessageType.REGISTER, answers=MessageType.REGISTERED, handler=handler
    )


async def call(bus: Bus, body: bytes, timeout_s: float = 2.0) -> bytes:
    return await rpc.call(
        bus, "registerWorker", MessageType.REGISTER, body, answers=MessageType.REGISTERED, timeout=timeout_s
    )


async def test_a_request_is_answered_and_an_error_keeps_its_class(buses: Buses) -> None:
    async def failing(_: Envelope) -> bytes:
        raise QueueFull("no room")

    async with serving(buses.dispatcher, ping):
        assert codec.decode(await call(buses.worker, b"12345"), Epoch).epoch == 5
    async with serving(buses.dispatcher, failing):
        with pytest.raises(QueueFull, match="no room"):
            await call(buses.worker, b"")


async def test_nobody_there_is_said_at_once(buses: Buses) -> None:
    with pytest.raises(BrokerUnavailable):
        await call(buses.worker, b"", timeout_s=60)


async def test_replayed_and_redirected_requests_are_not_answered(buses: Buses) -> None:
    handled: list[bytes] = []

    async def keep(envelope: Envelope) -> bytes:
        handled.append(envelope.body)
        return b""

    subject = buses.worker.names.service("registerWorker")
    async with serving(buses.dispatcher, keep):
        reply = buses.worker.reply_inbox()
        frame = buses.worker.signer.sign_envelope(MessageType.REGISTER, subject, b"x", reply=reply)
        await buses.worker.ask_signed(subject, frame, reply, timeout=2)
        refused = metrics.ENVELOPES_REJECTED.labels("replay")._value.get()
        with pytest.raises(BrokerUnavailable):
            await buses.worker.ask_signed(subject, frame, buses.worker.reply_inbox(), timeout=0.3)
        assert metrics.ENVELOPES_REJECTED.labels("replay")._value.get() == refused + 1
        other = buses.worker.signer.sign_envelope(MessageType.REGISTER, subject, b"y", reply=buses.worker.reply_inbox())
        with pytest.raises(BrokerUnavailable):
            await buses.worker.ask_signed(subject, other, buses.worker.reply_inbox(), timeout=0.3)
    assert handled == [b"x"]


async def test_every_refusal_of_the_broker_is_one_of_our_errors(buses: Buses) -> None:
    with pytest.raises(TetherError):
        await buses.dispatcher.api("STREAM.INFO.NOPE")
    with pytest.raises(TetherError):
        await buses.dispatcher.api("CONSUMER.CREATE.NOPE.x.y", {"stream_name": "NOPE", "config": {}})
