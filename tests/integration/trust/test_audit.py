"""The audit log on a real broker: every act leaves an entry, no outage loses one, and what is touched is named."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from support.brokers.audits import WHO, act, check, entries, everything, marks, numbers, reader, writer
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.audit import Checker, Kind, Record, What, repeated_attempts
from tether.audit import reader as audit_read
from tether.audit import writer as audit_log
from tether.audit.reader import Filter
from tether.audit.spool import read_run
from tether.audit.writer import AuditLog
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.errors import PermissionDenied, TetherError
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.process import metrics
from tether.streams.layout import ensure_platform
from tether.streams.updates import update_streams


@pytest.fixture
async def dispatcher(broker: Broker) -> AsyncIterator[Bus]:
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        await ensure_platform(bus, broker.settings)
        yield bus


async def test_what_is_recorded_is_in_the_stream_and_whole(broker: Broker, dispatcher: Bus) -> None:
    async with writer(broker) as (_, log):
        for number in range(1000):
            act(log, number)
        log.inference(TENANT, WHO, "infer", "ok", "digits", 1, "0" * 32, "r", 256, 40, 900)
    assert await numbers(dispatcher, broker.home) == list(range(1000))
    (one,) = await entries(dispatcher, broker.home, kind=Kind.INFERENCE, tenant=TENANT)
    assert (one.writer, one.entry.model, one.entry.bytes_in, one.entry.micros) == ("gateway", "digits", 256, 900)
    report = check(broker.home, await everything(dispatcher, broker.home))
    assert (report.problems, report.notes) == ((), ())
    assert report.writers == ("gateway",)


async def test_an_outage_loses_no_entry_and_keeps_their_order(embedded_broker: Broker) -> None:
    broker = embedded_broker
    assert broker.server is not None
    async with connect(broker.settings, broker.home, "dispatcher") as dispatcher, writer(broker) as (bus, log):
        await ensure_platform(dispatcher, broker.settings)
        number = 0
        for _ in range(3):
            await broker.server.kill()
            for _ in range(400):
                act(log, number)
                number += 1
            await log.settled()
            await broker.server.start()
            act(log, number)
            number += 1
            assert await bus.wait_connected(15)

        async def arrived() -> bool:
            try:
                return len(await numbers(dispatcher, broker.home)) == number
            except TetherError:
                return False

        await wait_until(arrived, "every entry is in the stream", 30)
        assert await numbers(dispatcher, broker.home) == list(range(number))
    assert check(broker.home, await _after(broker)).problems == ()


async def _after(broker: Broker) -> list[Record]:
    async with connect(broker.settings, broker.home, "admin") as admin:
        return await everything(admin, broker.home)


async def test_a_process_that_died_leaves_its_blocks_to_the_next(broker: Broker, dispatcher: Bus) -> None:
    """Its first blocks are in the stream and not known to be; the next process neither loses nor repeats one."""
    async with AsyncExitStack() as dying:
        bus = await dying.enter_async_context(connect(broker.settings, broker.home, "gateway"))
        log = AuditLog(bus, broker.home)
        sender = await log.begin()
        for number in range(300):
            act(log, number)
        await log.settled()
        assert log._spool is not None
        # sent, and dead before it could note the acknowledgement
        await sender._publish([record for record, _ in log._spool.waiting(64)])
        log.close()
    unsent = read_run(next((broker.home.audit / "gateway").glob("*/")))
    assert len(unsent.records) == 3
    async with writer(broker) as (_, log):
        act(log, 300)
    assert await numbers(dispatcher, broker.home) == list(range(301))
    found = await everything(dispatcher, broker.home)
    assert check(broker.home, found).problems == ()
    begins = [mark for record in found if record.subject.endswith(".checkpoint") for mark in marks(record)]
    previous = [mark for mark in begins if mark.what is What.PREVIOUS]
    assert {mark.subject.rpartition(".")[2] for mark in previous} == {"admin", "checkpoint"}
    assert len(list((broker.home.audit / "gateway").glob("*/"))) == 1


async def test_two_processes_of_one_identity_do_not_meet(broker: Broker, dispatcher: Bus) -> None:
    async with writer(broker) as (_, one), writer(broker) as (_, two):
        for number in range(0, 100, 2):
            act(one, number)
            act(two, number + 1)
    assert sorted(await numbers(dispatcher, broker.home)) == list(range(100))
    assert check(broker.home, await everything(dispatcher, broker.home)).problems == ()


async def test_a_flood_of_refusals_costs_a_handful_of_entries(broker: Broker, dispatcher: Bus) -> None:
    before = metrics.AUDIT_ENTRIES.labels("auth")._value.get()
    async with writer(broker) as (_, log):
        for number in range(50_000):
            log.count(Kind.AUTH, "", action="infer", outcome="unauthenticated", address=f"10.0.{number % 4}.1")
        for number in range(5_000):
            log.count(
                Kind.AUTH, "", actor=f"key:{number}", action="infer", outcome="unauthenticated", address="10.1.1.1"
            )
    found = await entries(dispatcher, broker.home, kind=Kind.AUTH)
    assert sum(item.entry.count for item in found) == 55_000
    assert metrics.AUDIT_ENTRIES.labels("auth")._value.get() - before == len(found)
    assert len(found) <= 2 * (repeated_attempts.MOST_GROUPS + 1)
    assert [item.entry.count for item in found if item.entry.address == "10.0.3.1"] == [12_500]
    assert sum(item.entry.count for item in found if item.entry.action == repeated_attempts.OTHERS) == 5_000 - 252


async def test_what_does_not_fit_is_counted_said_and_noted_and_nobody_waits(
    broker: Broker, dispatcher: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MOST_PENDING", 100)
    before = metrics.AUDIT_LOST._value.get()
    async with writer(broker) as (_, log):
        for number in range(150):
            act(log, number)
    assert metrics.AUDIT_LOST._value.get() - before == 50
    assert await numbers(dispatcher, broker.home) == list(range(100))
    (note,) = check(broker.home, await everything(dispatcher, broker.home)).notes
    assert "no room for 50 entries" in note


async def test_a_full_spool_takes_no_more_and_what_it_has_is_kept(embedded_broker: Broker) -> None:
    broker = embedded_broker
    assert broker.server is not None
    async with connect(broker.settings, broker.home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
        async with writer(broker, audit_spool_mb=1) as (bus, log):
            await broker.server.kill()
            written = 0
            for _ in range(40):
                for _ in range(256):
                    log.record(Kind.ADMIN, TENANT, actor=WHO, action="test", detail="x" * 150)
                    written += 1
                await log.settled()
            assert log._spool is not None
            assert log._spool.size < (2 << 20)
            assert log._pending
            await broker.server.start()
            assert await bus.wait_connected(15)

            async def arrived() -> bool:
                try:
                    found = await entries(dispatcher, broker.home, kind=Kind.ADMIN)
                except TetherError:
                    return False
                return len(found) == written

            await wait_until(arrived, "every entry is in the stream", 30)


async def test_a_full_stream_refuses_keeps_what_it_has_and_says_so(start_broker: StartBroker) -> None:
    async with start_broker(max_file_mb=256, audit_max_mb=1) as broker:
        async with connect(broker.settings, broker.home, "dispatcher") as bus:
            await ensure_platform(bus, broker.settings)
            async with writer(broker) as (_, log):
                act(log, 0)
                for _ in range(40):
                    for _ in range(256):
                        log.record(Kind.ADMIN, "big", actor=WHO, action="test", detail="x" * 150)
                    await log.settled()
                await wait_until(lambda: metrics.AUDIT_FULL._value.get() == 1, "the metric says that it is full")
                assert (await entries(bus, broker.home, kind=Kind.ADMIN))[0].entry.detail == "0"
                larger = dataclasses.replace(broker.settings, audit_max_mb=64)
                async with connect(broker.settings, broker.home, "admin") as admin:
                    assert await update_streams(admin, larger)
                await wait_until(lambda: metrics.AUDIT_FULL._value.get() == 0, "it is taken in", 20)
        async with connect(broker.settings, broker.home, "admin") as admin:
            assert len(await entries(admin, broker.home, kind=Kind.ADMIN)) == 40 * 256 + 1


async def test_nobody_can_delete_purge_or_change_what_is_written(broker: Broker, dispatcher: Bus) -> None:
    async with writer(broker) as (_, log):
        act(log, 1)
    stream = dispatcher.names.audit_stream
    for path, body in (
        (f"STREAM.MSG.DELETE.{stream}", {"seq": 1}),
        (f"STREAM.PURGE.{stream}", {}),
        (f"STREAM.DELETE.{stream}", {}),
        (f"STREAM.UPDATE.{stream}", {"name": stream, "subjects": ["x"], "max_age": 1}),
    ):
        with pytest.raises(TetherError):
            await dispatcher.api(path, body)
    async with connect(broker.settings, broker.home, "worker-1") as worker:
        with pytest.raises(PermissionDenied):
            await worker.publish_acked(worker.names.audit(TENANT, "admin"), b"x")
    assert await numbers(dispatcher, broker.home) == [1]


async def test_entries_that_were_forged_moved_or_sent_again_are_named(broker: Broker, dispatcher: Bus) -> None:
    async with writer(broker) as (bus, log):
        for number in range(3):
            act(log, number)
            await log.settled()
        genuine = next(record for record in await _sent(bus, broker, 3) if record.subject.endswith(".admin"))
        altered = bytearray(genuine.frame)
        altered[altered.index(b"key:abcdefgh") + 5] ^= 1
        forged = dispatcher.signer.sign_envelope(MessageType.AUDIT, genuine.subject, b"x", message_id="x")
        elsewhere = dispatcher.names.audit("other", "admin")
        for subject, frame in (
            (genuine.subject, bytes(altered)),
            (genuine.subject, genuine.frame),
            (genuine.subject, forged),
            (elsewhere, genuine.frame),
            (elsewhere, b"not signed"),
        ):
            await bus.publish_acked(subject, frame)
    found = check(broker.home, await everything(dispatcher, broker.home)).problems
    assert [(problem.what.partition(":")[0], problem.block, problem.entry) for problem in found] == [
        ("this entry was altered", 1, 1),
        ("it stands after block 3", 1, 0),
        ("it stands after block 3", 1, 0),
        ("it is signed, but is not a block of an audit log", 0, 0),
        (f"it was signed for {genuine.subject} and moved here", 1, 0),
        ("the message is not a signed envelope", 0, 0),
    ]
    assert await numbers(dispatcher, broker.home) == [0, 1, 2, 0]


async def _sent(bus: Bus, broker: Broker, blocks: int) -> list[Record]:
    found: list[Record] = []

    async def arrived() -> bool:
        found[:] = await everything(bus, broker.home)
        return sum(record.subject.endswith(".admin") for record in found) == blocks

    await wait_until(arrived, f"{blocks} blocks are in the stream")
    return found


async def test_pages_go_back_to_the_first_entry(broker: Broker, dispatcher: Bus) -> None:
    async with writer(broker) as (_, log):
        for number in range(700):
            act(log, number, tenant="b.c" if number % 2 else TENANT)
    log_reader = await reader(dispatcher, broker.home)
    seen: list[int] = []
    before = None
    while True:
        page, before = await log_reader.page(Filter(kind=Kind.ADMIN), 64, before)
        seen += [int(found.entry.detail) for found in page]
        if before is None:
            break
    assert sorted(seen) == list(range(700))
    odd, _ = await log_reader.page(Filter(tenant="b.c", kind=Kind.ADMIN), 1000)
    assert [int(found.entry.detail) for found in odd] == list(range(699, 0, -2))
    nothing, before = await log_reader.page(Filter(since=int(time.time() * 1000) + 60_000), 10)
    assert (nothing, before) == ([], None)


@pytest.mark.parametrize(
    ("mode", "kinds"), [("off", set()), ("security", {Kind.ADMIN}), ("full", {Kind.ADMIN, Kind.JOB, Kind.INFERENCE})]
)
async def test_the_setting_says_what_is_written(broker: Broker, dispatcher: Bus, mode: str, kinds: set[Kind]) -> None:
    async with writer(broker, audit=mode) as (_, log):
        act(log, 1)
        log.record(Kind.JOB, TENANT, actor=WHO, action="submit")
        log.inference(TENANT, WHO, "infer", "ok", "digits", 1, "0" * 32, "r", 256, 40, 900)
        await log.settled()
    assert {found.kind for found in await entries(dispatcher, broker.home)} == kinds
    assert broker.home.audit.exists() == (mode != "off")


async def test_inference_jobs_and_forged_messages_leave_entries_and_no_payload(one: Services) -> None:
    served = await one.push("bump", models.add())
    await one.infer(served, row(0.123456))
    with pytest.raises(TetherError):
        await one.infer(served, row(1)[:, :2])
    one.bus.verify_frame(b"forged", "tether.reply.abc.def", MessageType.ANSWER)
    await one.gateway.audit.settled()

    async def arrived() -> bool:
        return len(await entries(one.bus, one.home, kind=Kind.ENVELOPE)) == 1

    await wait_until(arrived, "the forged message is in the log")
    (done,) = await entries(one.bus, one.home, kind=Kind.INFERENCE)
    assert (done.tenant, done.entry.outcome, done.entry.model, done.entry.version) == (TENANT, "ok", "bump", 1)
    assert (done.entry.bytes_in, done.entry.bytes_out) == (16, 16)
    assert done.entry.micros > 0
    assert len(done.entry.job) == 32
    (forged,) = await entries(one.bus, one.home, kind=Kind.ENVELOPE)
    assert (forged.entry.outcome, forged.entry.detail) == ("unsigned", "tether.reply.abc")
    payload = row(0.123456).tobytes()
    assert not any(payload[:4] in record.frame for record in await everything(one.bus, one.home))


async def test_inference_goes_on_while_the_spool_cannot_be_written(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await one.push("bump", models.add())
    spool = one.gateway.audit._spool
    assert spool is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(spool, "append", full)
        for value in range(20):
            assert (await one.infer(served, row(value)))[0, 0] == value + 1
        await one.gateway.audit.settled()
    await one.gateway.audit.settled()

    async def arrived() -> bool:
        return len(await entries(one.bus, one.home, kind=Kind.INFERENCE)) == 20

    await wait_until(arrived, "no entry is lost")


async def test_a_cancelled_request_and_its_job_are_told_apart(one: Services) -> None:
    served = await one.push("bump", models.add())
    await one.workers[0].holder.stop(1)
    waiting = asyncio.ensure_future(one.infer(served, row(1)))
    await wait_until(lambda: one.gateway.inflight == 1, "it is on its way")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    await one.gateway.audit.settled()

    async def arrived() -> bool:
        return [f.entry.outcome for f in await entries(one.bus, one.home, kind=Kind.INFERENCE)] == ["job_cancelled"]

    await wait_until(arrived, "the entry says that its caller left")


async def test_the_other_services_write_too(one: Services) -> None:
    await one.push("bump", models.add())

    async def arrived() -> bool:
        found = await entries(one.bus, one.home)
        return {(item.writer, item.entry.action) for item in found} >= {
            ("modelstore", "register"),
            ("dispatcher", "register worker"),
        }

    await wait_until(arrived, "both services' entries are there")
    (pushed,) = await entries(one.bus, one.home, kind=Kind.MODEL)
    assert (pushed.entry.model, pushed.entry.version, pushed.entry.actor) == ("bump", 1, "gateway")
    (joined,) = await entries(one.bus, one.home, kind=Kind.IDENTITY)
    assert (joined.entry.actor, joined.entry.outcome) == ("worker-1", "ok")
    report = check(one.home, await everything(one.bus, one.home))
    assert (report.problems, set(report.writers)) == ((), {"dispatcher", "gateway", "modelstore"})


async def test_entries_signed_with_a_key_that_was_replaced_still_count(one: Services) -> None:
    home, gateway = one.home, one.gateway
    act(gateway.audit, 1)
    await gateway.audit.settled()
    old = gateway.bus.signer.kid
    keyset_editor.rotate(home, RootKey(home.root_key), "gateway", grace_s=0)
    await wait_until(lambda: gateway.bus.signer.kid != old, "the gateway signs with its new key", 15)
    act(gateway.audit, 2)
    await gateway.audit.settled()

    async def arrived() -> bool:
        return await numbers(one.bus, home) == [1, 2]

    await wait_until(arrived, "entries of both keys are read")
    async with connect(one.settings, home, "admin") as admin:
        signed = await audit_read.keysets(admin, home)
    assert len(signed) >= 2
    checker = Checker(audit_read.historical(signed, home.root_public.read_bytes()), 365 * 86_400_000)
    for record in await everything(one.bus, home):
        checker.add(record)
    assert checker.finish().problems == ()
    seen = [found.entry for found in await entries(one.bus, home, kind=Kind.IDENTITY) if found.entry.action == "keyset"]
    assert any("gateway" in entry.detail for entry in seen)
