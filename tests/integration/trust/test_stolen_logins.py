"""What a stolen login of the dispatcher or of a worker can do at the broker, and what it cannot (S47, S48)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.brokers.brokers import embedded, wait_until
from support.brokers.logins import TENANT, Logins, add_bound_worker, connected

from tether.broker.embedded_server import Binary
from tether.broker.permissions import streams_made
from tether.bus.bus import Bus, Message
from tether.bus.errors import JetStreamError
from tether.bus.session import connect
from tether.errors import PermissionDenied
from tether.process.data_dir import Home
from tether.streams.job_queue import BusResults


@pytest.fixture
async def logins(home: Home, nats_binary: Binary) -> AsyncIterator[Logins]:
    add_bound_worker(home)
    async with embedded(home, nats_binary) as broker, connected(broker) as made:
        yield made


async def configuration(bus: Bus, stream: str) -> dict[str, Any]:
    found: dict[str, Any] = (await bus.api(f"STREAM.INFO.{stream}"))["config"]
    return found


def copying(bus: Bus, name: str, *sources: str) -> dict[str, Any]:
    """A stream that takes in what others hold, and sends it on to the inbox of whoever made it."""
    return {
        "name": name,
        "storage": "memory",
        "sources": [{"name": source} for source in sources],
        "republish": {"src": ">", "dest": f"{bus.inbox}.copy.>"},
    }


async def test_the_dispatcher_changes_no_stream(logins: Logins) -> None:
    """Who may change one may empty it (``max_msgs``), or have all of it copied (``republish``, ``sources``)."""
    bus = logins.dispatcher
    for stream in streams_made(bus.names, [TENANT]):
        for change in ({"max_msgs": 1, "discard": "old"}, {"sources": [{"name": bus.names.results_stream}]}):
            with pytest.raises(PermissionDenied):
                await bus.api(f"STREAM.UPDATE.{stream}", {"name": stream, **change})


async def test_the_dispatcher_empties_no_stream_but_of_jobs_that_ended(logins: Logins) -> None:
    bus, names = logins.dispatcher, logins.dispatcher.names
    results = {names.results_stream, names.pool_results_stream(TENANT)}
    for stream in streams_made(names, [TENANT]):
        calls = {"PURGE": {}, "MSG.DELETE": {"seq": 1}, "DELETE": {}, "SNAPSHOT": {"deliver_subject": bus.inbox}}
        if stream == names.bucket_stream("jobs"):
            del calls["PURGE"]
        if stream in results:
            del calls["MSG.DELETE"]
        if stream == names.infer_stream(0):
            del calls["DELETE"]
        for verb, body in calls.items():
            with pytest.raises(PermissionDenied):
                await bus.api(f"STREAM.{verb}.{stream}", body)


async def test_the_dispatcher_makes_no_stream_of_another_name_and_none_over_one_that_is_there(logins: Logins) -> None:
    bus = logins.dispatcher
    for name in ("COPY", "TETHER_JOBS_=stranger"):
        with pytest.raises(PermissionDenied):
            await bus.api(f"STREAM.CREATE.{name}", copying(bus, name, bus.names.results_stream))
    name = bus.names.dead_stream
    before = await configuration(bus, name)
    with pytest.raises(JetStreamError, match="already in use"):
        await bus.api(f"STREAM.CREATE.{name}", copying(bus, name, bus.names.results_stream))
    assert await configuration(bus, name) == before


async def test_the_dispatcher_reads_neither_keys_nor_chunks_nor_dead_letters(logins: Logins) -> None:
    bus, names = logins.dispatcher, logins.dispatcher.names
    hidden = [
        names.bucket_stream(bucket) for bucket in ("apikeys", "keyuse", "tenantkeys", "modelkeys", "attempts", "puts")
    ]
    hidden += [names.object_stream(names.partition_bucket(0)), names.dead_stream]
    for stream in hidden:
        for call in (f"DIRECT.GET.{stream}", f"STREAM.MSG.GET.{stream}", f"DIRECT.GET.{stream}.>"):
            with pytest.raises(PermissionDenied):
                await bus.api(call, {"seq": 1})


async def test_the_dispatcher_has_consumers_on_lanes_alone(logins: Logins) -> None:
    bus, names = logins.dispatcher, logins.dispatcher.names
    lane = names.lane(logins.lane)
    spy = {"name": "spy", "deliver_subject": f"{bus.inbox}.spy", "ack_policy": "none", "filter_subject": lane}
    lanes = {names.infer_stream(0), names.jobs_stream(0), *names.pool_streams(TENANT)[:2]}
    for stream in set(streams_made(names, [TENANT])) - lanes:
        for form in (
            "CREATE.{}",
            "CREATE.{}.spy",
            f"CREATE.{{}}.spy.{lane}",
            "CREATE.{}.spy.>",
            "DURABLE.CREATE.{}.spy",
        ):
            with pytest.raises(PermissionDenied):
                await bus.api(f"CONSUMER.{form.format(stream)}", {"stream_name": stream, "config": spy})


async def test_a_right_to_make_a_stream_that_is_not_there_is_one_to_copy_others_into_it(logins: Logins) -> None:
    """What remains: no right of nats-server is about the body of a request. An infer stream may be deleted, since that is how it
    is made again when its server is away; what is then made in its place may have sources. Everybody sees that it is gone."""
    bus, heard = logins.dispatcher, list[bytes]()

    async def hear(message: Message) -> None:
        heard.append(message.data)

    await logins.modelstore.publish_acked(bus.names.bucket_key("models", "m.1"), b"a manifest")
    await bus.subscribe(f"{bus.inbox}.copy.>", hear)
    stream = bus.names.infer_stream(0)
    await bus.api(f"STREAM.DELETE.{stream}")
    await bus.api(f"STREAM.CREATE.{stream}", copying(bus, stream, bus.names.bucket_stream("models")))
    await wait_until(lambda: b"a manifest" in heard, "the broker copied it")


@pytest.mark.parametrize("tenant", ["shared", TENANT])
async def test_a_worker_learns_that_a_job_ended_and_nothing_of_the_result(logins: Logins, tenant: str) -> None:
    bus, other = (logins.worker, logins.other) if tenant == "shared" else (logins.own, logins.own)
    assert await BusResults(other).commit("job", b"outputs of another worker's job", pool=tenant)
    names, stream = bus.names, bus.names.pool_results_stream(tenant)
    for subject in (names.result("job", tenant), names.results(tenant), "tether.result.>", "*", ">"):
        with pytest.raises(PermissionDenied):
            await bus.direct_get(stream, subject)
        with pytest.raises(PermissionDenied):
            await bus.direct_batch(stream, [subject, subject])
    for wish in ({"seq": 1}, {"multi_last": [">"]}, {"seq": 1, "batch": 9, "next_by_subj": ">"}):
        for call in (f"DIRECT.GET.{stream}", f"STREAM.MSG.GET.{stream}"):
            with pytest.raises(PermissionDenied):
                await bus.api(call, wish)
    before = (await logins.dispatcher.api(f"STREAM.INFO.{stream}"))["state"]
    assert await BusResults(bus).ended(["job", "another"], pool=tenant) == {"job"}
    assert (await logins.dispatcher.api(f"STREAM.INFO.{stream}"))["state"] == before, "asking stores nothing"


async def test_a_worker_asks_in_its_own_pool_alone_whether_a_job_ended(logins: Logins) -> None:
    assert await BusResults(logins.worker).commit("job", b"shared")
    with pytest.raises(PermissionDenied):
        await BusResults(logins.own).ended(["job"])
    with pytest.raises(PermissionDenied):
        await BusResults(logins.worker).ended(["job"], pool=TENANT)


async def test_results_that_are_full_still_say_what_ended(logins: Logins) -> None:
    results = BusResults(logins.worker)
    assert await results.commit("job", b"x" * 1000)
    stream = logins.worker.names.results_stream
    config = await configuration(logins.dispatcher, stream)
    async with connect(logins.broker.settings, logins.broker.home, "admin") as admin:
        await admin.api(f"STREAM.UPDATE.{stream}", {**config, "max_bytes": 1})
    assert await results.ended(["job", "another"]) == {"job"}
