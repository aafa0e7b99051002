"""Ended jobs are forgotten after their time, and earlier when there is no room; open ones never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.brokers.operators import reconfigure
from support.brokers.stored import count
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.bus.key_value.bucket import KvBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.dispatcher.jobs.retention import Retention
from tether.domain.job import LONGEST_DEADLINE_S, record_key
from tether.errors import JobNotFound, QueueFull
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.settings import Settings
from tether.streams.layout import DEAD, JOBS, NOTES, RECORDS, RESULTS, pool_streams, streams
from tether.streams.updates import differing_streams, update_streams
from tether.wire import codec
from tether.wire.subjects import Names

SMALL_MB = 256


@pytest.fixture
async def short(start_broker: StartBroker) -> AsyncIterator[Services]:
    """Results are kept as briefly as may be."""
    async with start_broker(result_ttl_s=60, max_file_mb=SMALL_MB) as broker, services(broker, workers=1) as running:
        yield running


async def submit(running: Services, served: ResolvedVersion, count: int, tenant: str = TENANT) -> list[str]:
    jobs = await running.gateway.jobs.submit(tenant, [new_job(served, row(number)) for number in range(count)])
    return [job["id"] for job in jobs]


async def ended(running: Services, ids: list[str], tenant: str = TENANT) -> None:
    for start in range(0, len(ids), 200):
        jobs = await running.gateway.jobs.get_many(tenant, ids[start : start + 200], 30)
        assert {job["state"] for job in jobs} == {"succeeded"}


async def known(running: Services, ids: list[str], tenant: str = TENANT) -> list[str]:
    """Those that are still told of."""
    found = await running.gateway.jobs._records.find(ids)
    return [job for job in ids if job in found and found[job].tenant == tenant]  # type: ignore[index]


async def messages(running: Services, stream: str) -> int:
    assert running.dispatcher is not None
    return await count(running.dispatcher._bus, stream)


async def test_a_job_is_forgotten_result_ttl_s_after_its_end_and_not_before(
    short: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its deadline, a day ahead, does not count."""
    served = await short.push("bump", models.add())
    ids = [job["id"] for job in await short.gateway.jobs.submit(TENANT, [new_job(served, row(1), deadline_s=86400)])]
    await ended(short, ids)
    await short.workers[0].holder.stop(1)
    waiting = await submit(short, served, 1)
    assert short.dispatcher is not None
    retention, clock = short.dispatcher.retention, short.dispatcher._bus.clock
    now = clock.utc
    monkeypatch.setattr(clock, "utc", lambda: now() + 50)
    await retention.round()
    assert await known(short, ids) == ids
    monkeypatch.setattr(clock, "utc", lambda: now() + 100)
    await retention.round()
    assert await known(short, ids) == []
    with pytest.raises(JobNotFound):
        await short.gateway.jobs.get(TENANT, ids[0])
    assert await messages(short, short.bus.names.results_stream) == 0
    await wait_until(lambda: left(short, 1), "nothing is left of its record")
    assert await known(short, waiting) == waiting


async def left(running: Services, count: int) -> bool:
    return await messages(running, running.bus.names.bucket_stream("jobs")) == count


async def tighten(running: Services, stream: str, most: int) -> None:
    await reconfigure(running.home, running.settings, stream, max_bytes=most)


async def used(running: Services, stream: str) -> int:
    assert running.dispatcher is not None
    return int((await running.dispatcher._bus.api(f"STREAM.INFO.{stream}"))["state"]["bytes"])


@pytest.mark.parametrize("store", ["records", "results"])
async def test_the_oldest_ends_make_room_and_open_jobs_never(one: Services, store: str) -> None:
    assert one.dispatcher is not None
    served = await one.push("bump", models.add())
    waits = await one.push("waits", models.add())
    idle = [job["id"] for job in await one.gateway.jobs.submit(TENANT, [new_job(waits, row(0)) for _ in range(20)])]
    await ended(one, idle)
    ids = [await submit(one, served, 100) for _ in range(5)]
    for part in ids:
        await ended(one, part)
    stream = one.bus.names.results_stream if store == "results" else one.bus.names.bucket_stream("jobs")
    await one.workers[0].holder.stop(1)
    waiting = await submit(one, served, 30)
    await tighten(one, stream, int(await used(one, stream) / 0.85))
    await one.dispatcher.retention.round()
    kept = await known(one, [job for part in ids for job in part])
    assert kept == [job for part in ids for job in part][-len(kept) :]
    assert 300 < len(kept) < 480
    assert await known(one, waiting) == waiting
    await ended(one, kept)


async def test_ended_jobs_keep_a_share_when_open_ones_fill_the_records(short: Services) -> None:
    """What has ended is still told of, and more jobs are refused with the bound's name."""
    served = await short.push("bump", models.add())
    records = short.bus.names.bucket_stream("jobs")
    await tighten(short, records, 300_000)
    ids = await submit(short, served, 30)
    await ended(short, ids)
    await short.workers[0].holder.stop(1)
    with pytest.raises(QueueFull, match=r"records of open durable jobs fill .* raise max_file_mb"):
        await fill(short, served)
    assert short.dispatcher is not None
    await short.dispatcher.retention.round()
    assert await known(short, ids) == ids
    await ended(short, ids)


async def fill(running: Services, served: ResolvedVersion) -> None:
    for _ in range(20):
        await submit(running, served, 50)


async def test_submits_find_room_however_many_jobs_have_ended(short: Services) -> None:
    """Four times as many jobs as the store of records takes, and nobody is refused."""
    served = await short.push("bump", models.add())
    records = short.bus.names.bucket_stream("jobs")
    await tighten(short, records, 200_000)
    for _ in range(12):
        await ended(short, await submit(short, served, 100))
    assert await used(short, records) < 200_000


async def test_a_tenant_that_keeps_little_is_spared_when_another_ones_jobs_make_room(one: Services) -> None:
    assert one.dispatcher is not None
    served = await one.push("bump", models.add())
    modest = await submit(one, served, 10, "modest")
    await ended(one, modest, "modest")
    flood = await submit(one, served, 400)
    await ended(one, flood)
    records = one.bus.names.bucket_stream("jobs")
    await tighten(one, records, int(await used(one, records) / 0.85))
    await one.dispatcher.retention.round()
    assert await known(one, modest, "modest") == modest
    assert 0 < len(await known(one, flood)) < 380


@pytest.mark.parametrize("length", [24, 32])
async def test_records_of_homes_of_before_are_forgotten_too(
    short: Services, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    served = await short.push("bump", models.add())
    ids = await submit(short, served, 1)
    await ended(short, ids)
    records = short.gateway.jobs._records
    (record,) = (await records.find(ids)).values()
    subject = short.bus.names.bucket_key("jobs", record.id[:length])
    frame = short.bus.signer.sign_envelope(MessageType.RECORD, subject, codec.encode_record(record))
    await short.bus.publish_acked(subject, frame)
    stored = await short.bus.direct_get(records.raw.stream, records.raw.subject(record.key))
    assert stored is not None
    await records.raw.forget(record.key, stored.sequence)
    assert await known(short, ids) == ids
    assert short.dispatcher is not None
    clock = short.dispatcher._bus.clock
    now = clock.utc
    monkeypatch.setattr(clock, "utc", lambda: now() + 100)
    await short.dispatcher.retention.round()
    assert await known(short, ids) == []


async def test_two_dispatchers_forget_the_same_jobs_without_harm(
    short: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await short.push("bump", models.add())
    ids = await submit(short, served, 300)
    await ended(short, ids)
    assert short.dispatcher is not None
    bus = short.dispatcher._bus
    now = bus.clock.utc
    monkeypatch.setattr(bus.clock, "utc", lambda: now() + 100)
    await asyncio.gather(short.dispatcher.retention.round(), Retention(bus).round())
    assert await known(short, ids) == []
    assert await messages(short, short.bus.names.results_stream) == 0


async def test_a_forgotten_job_stays_forgotten_when_the_broker_is_killed(
    restartable: tuple[Broker, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker reads its files again. A record that came back would be that of an open job without a lane, and be lost."""
    broker, running = restartable
    served = await running.push("bump", models.add())
    forgotten = await submit(running, served, 30)
    await ended(running, forgotten)
    assert running.dispatcher is not None
    clock, records = running.dispatcher._bus.clock, running.bus.names.bucket_stream("jobs")
    now = clock.utc
    with monkeypatch.context() as patch:
        patch.setattr(clock, "utc", lambda: now() + broker.settings.result_ttl_s + 10)
        await running.dispatcher.retention.round()
    kept = await submit(running, served, 5)  # in the same file of the broker's
    await ended(running, kept)
    await wait_until(lambda: holds(running, {records: 5}), "nothing else is left")
    assert broker.server is not None
    await broker.server.kill()
    await wait_until(lambda: not running.bus.connected, "it is away")
    await broker.server.start()
    assert await running.bus.wait_connected(10)
    assert await messages(running, records) == 5
    assert await known(running, [*forgotten, *kept]) == kept


async def test_an_older_broker_configuration_does_not_keep_jobs(one: Services) -> None:
    """A gateway has no more rights than a dispatcher had before. What was written after the entry stays."""
    records, stream = KvBucket(one.bus, "jobs"), one.bus.names.bucket_stream("jobs")
    await records.put("a", b"1")
    first = await one.bus.direct_get(stream, records.subject("a"))
    assert first is not None
    await records.put("a", b"2")
    assert one.dispatcher is not None
    for bus in (one.bus, one.dispatcher._bus):
        await KvBucket(bus, "jobs").remove("a", first.sequence)
        assert await records.get("a") == b"2"
    await records.remove("a", first.sequence + 1)
    assert await records.get("a") is None


def test_all_stores_together_fit_the_disk() -> None:
    for megabytes in (256, 20480, 1 << 20):
        settings, names = Settings(max_file_mb=megabytes), Names()
        bounds = {
            config["name"]: config["max_bytes"] for config in streams(names, settings) if config["storage"] == "file"
        }
        pools = sum(config["max_bytes"] for config in pool_streams(names, "a", settings) if config["storage"] == "file")
        bounded = sum(most for most in bounds.values() if most > 0) + pools * settings.max_isolated_tenants
        assert bounded <= megabytes * (1 << 20) * 31 // 32
    assert JOBS + RESULTS + RECORDS + DEAD + NOTES == 26


async def test_a_stream_of_results_keeps_its_messages_longer_than_the_records_are(one: Services) -> None:
    """An end that were forgotten before its record would make the job open again."""
    assert one.dispatcher is not None
    bus, names = one.dispatcher._bus, one.bus.names
    records = (await bus.api(f"STREAM.INFO.{names.bucket_stream('jobs')}"))["config"]
    results = (await bus.api(f"STREAM.INFO.{names.results_stream}"))["config"]
    assert results["max_age"] > records["max_age"] > LONGEST_DEADLINE_S * 10**9


async def test_all_that_is_left_of_a_job_is_one_record_and_one_result(one: Services) -> None:
    """Each message more would cost the broker memory for as long as the job is kept; so would a time to live of its own."""
    served = await one.push("bump", models.add())
    slow = await one.push("slow", models.looping(400_000), max_batch_size=1)
    requests = [new_job(served, row(number), key=f"key-{number}" if number % 2 else "") for number in range(60)]
    ids = [job["id"] for job in await one.gateway.jobs.submit(TENANT, [*requests, new_job(slow, row(1))])]
    await ended(one, ids)
    names = one.bus.names
    kept = dict.fromkeys((names.bucket_stream("jobs"), names.results_stream), 61)
    kept |= {names.bucket_stream("attempts"): 0, names.jobs_stream(0): 0, names.dead_stream: 0}
    await wait_until(lambda: holds(one, kept), "nothing else is left")
    for job in ids:
        record = await one.bus.direct_get(names.bucket_stream("jobs"), names.bucket_key("jobs", record_key(job)))
        result = await one.bus.direct_get(names.results_stream, names.result(job))
        assert record is not None
        assert result is not None
        assert "Nats-TTL" not in {**record.headers, **result.headers}
        assert len(record.data) < 600
        assert len(result.data) < 500


async def holds(running: Services, kept: dict[str, int]) -> bool:
    return {stream: await messages(running, stream) for stream in kept} == kept


async def test_a_list_ends_where_the_kept_jobs_do(one: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many were forgotten before them: no page of it is empty for want of what is gone."""
    served = await one.push("bump", models.add())
    monkeypatch.setattr("tether.gateway_http.jobs.listing._WINDOW", 8)
    monkeypatch.setattr("tether.gateway_http.jobs.listing._MAX_RECORDS", 16)
    gone = await submit(one, served, 200)
    ids = await submit(one, served, 5)
    await ended(one, [*gone, *ids])
    records = one.gateway.jobs._records
    for job, record in (await records.find(gone)).items():
        stored = await one.bus.direct_get(records.raw.stream, records.raw.subject(record.key))
        assert stored is not None, job
        await records.raw.forget(record.key, stored.sequence)
    await wait_until(lambda: left(one, 5), "only the kept ones are there")
    page, cursor = await one.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor="")
    while cursor is not None and not page:
        page, cursor = await one.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor=cursor)
    assert {job["id"] for job in page} == set(ids)
    assert cursor is None


async def test_a_home_of_before_gets_the_new_bounds(start_broker: StartBroker) -> None:
    """Some stores grow and others shrink, and the broker has no room to spare."""
    async with (
        start_broker(max_file_mb=SMALL_MB) as broker,
        connect(broker.settings, broker.home, "dispatcher") as bus,
        connect(broker.settings, broker.home, "admin") as admin,
    ):
        now, disk = {config["name"]: config for config in streams(bus.names, broker.settings)}, SMALL_MB << 20
        before: dict[str, dict[str, Any]] = {
            bus.names.results_stream: {"max_bytes": disk // 8},
            bus.names.dead_stream: {"max_bytes": disk // 16, "discard": "new"},
            bus.names.bucket_stream("jobs"): {"max_bytes": disk // 16, "max_age": 0},
            bus.names.bucket_stream("attempts"): {"max_bytes": disk // 32, "discard": "new"},
        }
        for name, config in now.items():
            await bus.api(f"STREAM.CREATE.{name}", {**config, **before.get(name, {})})
        assert set(await update_streams(admin, broker.settings)) == set(before)
        assert await differing_streams(admin, broker.settings) == {}
        for name in before:
            config = (await bus.api(f"STREAM.INFO.{name}"))["config"]
            for field in ("max_bytes", "max_age", "discard"):
                assert config[field] == now[name][field], (name, field)
