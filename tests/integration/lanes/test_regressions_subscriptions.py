"""What subscribes must also end: pulls, watches and waits, with and without a broker."""

from __future__ import annotations

import asyncio

import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.domain.job import JobId, JobRecord, Priority
from tether.errors import BrokerUnavailable
from tether.gateway_http.jobs.open_job_counter import OpenJobCounter
from tether.process import metrics
from tether.streams.lane_consumer import COLD_S, Delivery, LaneConsumer
from tether.streams.layout import ensure_lane, lanes_of


def subscriptions(bus: Bus) -> int:
    return len(bus._client._subs)


async def test_an_outage_leaves_no_subscription_behind(restartable: tuple[Broker, Services]) -> None:
    broker, running = restartable
    assert broker.server is not None
    served = await running.push("bump", models.add())
    await running.workers[0].holder.stop(1)
    (job,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    pull = LaneConsumer(running.workers[0]._bus, served.infer_lane, 2, lambda _: None)
    gateway, worker = subscriptions(running.bus), subscriptions(running.workers[0]._bus)
    await pull.start()
    waiting = [asyncio.create_task(running.gateway.jobs.get(TENANT, job["id"], 30.0)) for _ in range(3)]
    await wait_until(lambda: subscriptions(running.bus) == gateway + 3, "three wait")
    await wait_until(lambda: subscriptions(running.workers[0]._bus) == worker + 1, "the lane is pulled")
    await broker.server.kill()
    await wait_until(lambda: not running.bus.connected, "the broker is gone")
    pull._restart()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await pull.stop()
    await broker.server.start()
    assert await running.bus.wait_connected(10)
    assert subscriptions(running.bus) == gateway
    assert subscriptions(running.workers[0]._bus) == worker


async def test_a_lane_that_was_cold_is_not_begun_anew_while_its_first_message_is_worked_on(one: Services) -> None:
    served = await one.push("bump", models.add())
    await one.workers[0].holder.stop(1)
    got: list[Delivery] = []
    pull = LaneConsumer(one.workers[0]._bus, served.job_lane(Priority.NORMAL), 3, got.append)
    pull._expiry_s = COLD_S
    await pull.start()
    await wait_until(lambda: pull._outstanding == 3, "the lane is pulled")
    resets = metrics.PULL_RESETS._value.get()
    await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    await wait_until(lambda: len(got) == 1, "the job was delivered")
    heartbeat_s = COLD_S / 4
    assert pull._silence_s() > 2 * heartbeat_s, "the pull that is still open has the heartbeat of a cold lane"
    assert metrics.PULL_RESETS._value.get() == resets
    await pull.stop()


async def test_after_a_reconnect_busy_lanes_are_pulled_before_those_that_rest(one: Services) -> None:
    served = await one.push("bump", models.add())
    await one.workers[0].holder.stop(1)
    bus = one.workers[0]._bus
    pulls = [LaneConsumer(bus, served.job_lane(level), 1, lambda _: None) for level in Priority]
    for pull in pulls:
        await pull.start()
    await wait_until(lambda: all(pull._outstanding for pull in pulls), "the lanes are pulled")
    busy, *resting = pulls
    before = [pull._inbox for pull in pulls]
    for pull in resting:
        pull._expiry_s = COLD_S
    bus.begin_again()
    assert [pull._lost for pull in pulls] == [True, False, False]
    await wait_until(lambda: busy._inbox is not before[0], "the busy lane is pulled anew")
    await wait_until(lambda: all(pull._inbox not in before for pull in pulls), "so are the others, within a second", 5)
    await asyncio.gather(*[pull.stop() for pull in pulls])


async def test_a_lane_without_a_consumer_is_pulled_as_soon_as_it_has_one(one: Services) -> None:
    assert one.dispatcher is not None
    lane = lanes_of("absent", 1, "local")[0]
    got: list[Delivery] = []
    pull = LaneConsumer(one.workers[0]._bus, lane, 1, got.append)
    pull._expiry_s = COLD_S
    await pull.start()
    await wait_until(lambda: pull._absences > 2, "the broker said more than once that there is none")
    await one.bus.publish_acked(one.bus.names.lane(lane), b"somebody waits")
    await ensure_lane(one.dispatcher._bus, lane, one.settings)
    await wait_until(lambda: len(got) == 1, "it is delivered", 5)
    await pull.stop()


async def test_what_arrives_for_a_pull_that_has_ended_is_left_to_others(one: Services) -> None:
    got: list[Delivery] = []
    pull = LaneConsumer(one.workers[0]._bus, lanes_of("bump", 1, "local")[0], 1, got.append)
    await pull.start()
    await wait_until(lambda: pull._inbox is not None and pull._inbox.subscription is not None, "the pull listens")
    inbox = pull._inbox
    assert inbox is not None
    assert inbox.subscription is not None
    late = inbox.subscription._inner._cb
    assert late is not None
    await pull.stop()

    class Late:
        subject, data, headers = "inbox", b"", None
        reply = "$JS.ACK.s.c.1.1.1.1.0"

    await late(Late())
    assert not got


async def test_an_entry_that_its_reader_cannot_take_hides_no_other(one: Services) -> None:
    seen: list[str] = []

    def changed(key: str, _: bytes | None) -> None:
        if key == "bad":
            raise ValueError(key)
        seen.append(key)

    bucket = KvBucket(one.bus, "apikeys")
    for key in ("a", "bad", "z"):
        await bucket.put(key, b"x")
    async with asyncio.timeout(10), bucket.watch(changed):
        assert {"a", "z"} <= set(seen)
        await bucket.put("later", b"x")
        await wait_until(lambda: "later" in seen, "changes are heard of")


async def test_a_change_heard_while_the_stream_cannot_be_read_is_looked_up_again(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bytes | None] = {}
    bucket = KvBucket(one.bus, "apikeys")

    async def away(_: str) -> bytes | None:
        raise BrokerUnavailable("away")

    monkeypatch.setattr(bucket, "get", away)
    async with bucket.watch(seen.__setitem__):
        await bucket.put("key", b"x")
        await wait_until(lambda: seen.get("key") == b"x", "the change is seen", 5)


async def test_who_stops_waiting_for_the_broker_does_not_make_the_connection_deaf(one: Services) -> None:
    """A task that is cancelled between ping and pong: subscribing and ending do that whenever the machine is busy."""
    client = one.bus._client
    for _ in range(3):
        flushing = asyncio.create_task(one.bus.flush())
        while not client._pongs:
            await asyncio.sleep(0)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        assert flushing.cancelled()
        await one.bus.flush()
    assert not client._reading_task.done()


async def test_a_connection_that_hears_nothing_any_more_is_made_anew(one: Services) -> None:
    client, losses = one.bus._client, one.bus.losses
    client._reading_task.cancel()
    await wait_until(lambda: one.bus.losses > losses and one.bus.connected, "it is connected again", 30)
    await one.bus.flush()


async def test_jobs_that_were_not_accepted_after_all_are_forgotten_with_their_pool(one: Services) -> None:
    record = JobRecord(JobId("j"), TENANT, "m", 1, Priority.NORMAL, 0.0, 4e9, "", "b", pool=TENANT)
    jobs = OpenJobCounter(one.bus)
    await jobs.look(TENANT, enough=0)
    jobs.accepted(TENANT, [record])
    assert jobs._counts[TENANT].pools == {record.id: TENANT}
    jobs.take_back(TENANT, [record], 0)
    assert (jobs.known(TENANT), jobs._counts[TENANT].pools) == (0, {})
