"""The audit log after a power cut: what the broker lost is stored again, or said; what was taken is told apart from it."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
from support.brokers import cuts
from support.brokers.audits import act, check, everything, marks, numbers, writer
from support.brokers.brokers import Broker, wait_until

from tether.audit import What
from tether.audit.writer import AuditLog
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.streams.layout import ensure_platform


@pytest.fixture
async def audited(embedded_broker: Broker) -> Broker:
    async with connect(embedded_broker.settings, embedded_broker.home, "dispatcher") as bus:
        await ensure_platform(bus, bus.settings)
    return embedded_broker


async def sent(log: AuditLog) -> None:
    await log.settled()
    assert log._sender is not None
    assert await log._sender.drained(10)


async def written(log: AuditLog, first: int, count: int) -> None:
    """Entries in blocks of their own, all of them in the stream."""
    for number in range(first, first + count):
        act(log, number)
        await sent(log)


async def restored(broker: Broker) -> Bus:
    """The stream is made again over what the cut left, as the dispatcher does."""
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        await ensure_platform(bus, bus.settings)
    return bus


async def test_a_writer_that_lives_stores_again_what_the_broker_lost(audited: Broker) -> None:
    async with writer(audited) as (bus, log):
        await written(log, 0, 3)
        earlier = await cuts.keep(audited, bus.names.audit_stream)
        assert await bus.wait_connected(10)
        await written(log, 3, 4)
        await cuts.cut(audited, earlier)
        await restored(audited)
        assert await bus.wait_connected(10)
        await written(log, 7, 2)
    async with connect(audited.settings, audited.home, "dispatcher") as bus:
        assert await numbers(bus, audited.home) == list(range(9))
        assert check(audited.home, await everything(bus, audited.home)).problems == ()


@pytest.mark.parametrize("durability", ["fast", "durable"])
async def test_a_lost_end_is_a_note_after_a_power_cut_and_a_problem_where_none_can_be_lost(
    audited: Broker, durability: str
) -> None:
    async with AsyncExitStack() as dying:
        bus, log = await dying.enter_async_context(writer(audited))
        await written(log, 0, 3)
        earlier = await cuts.keep(audited, bus.names.audit_stream)
        assert await bus.wait_connected(10)
        await written(log, 3, 4)
        folder = audited.home.audit / "gateway"
        state = (next(folder.glob("*/")) / "state").read_bytes()
        run = log.run
    # as if the process had died where its last block was acknowledged
    left = folder / run
    left.mkdir(exist_ok=True)
    (left / "state").write_bytes(state)
    await cuts.cut(audited, earlier)
    await restored(audited)
    async with writer(audited, durability=durability) as (_, log):
        await written(log, 7, 1)
        await wait_until(lambda: log._sender is not None and not log._sender.cuts, "the cut is in a checkpoint")
        await sent(log)
    async with connect(audited.settings, audited.home, "dispatcher") as bus:
        assert await numbers(bus, audited.home) == [0, 1, 2, 7]
        found = await everything(bus, audited.home)
        report = check(audited.home, found)
    said = [mark for item in found if item.subject.endswith(".checkpoint") for mark in marks(item)]
    if durability == "fast":
        assert report.problems == ()
        assert any("lost at its end" in note and run in note for note in report.notes)
        assert {mark.run for mark in said if mark.what is What.CUT} == {run}
    else:
        assert {problem.run for problem in report.problems} == {run}
        assert not any(mark.what is What.CUT for mark in said)


async def test_blocks_that_a_spool_lost_on_their_way_are_a_note_too(audited: Broker) -> None:
    """The stream has all that it acknowledged; what was still in the spool went with the machine's memory."""
    async with AsyncExitStack() as dying:
        bus = await dying.enter_async_context(connect(audited.settings, audited.home, "gateway"))
        log = AuditLog(bus, audited.home)
        await log.begin()
        act(log, 0)
        await log.settled()
        assert log._sender is not None
        await log._sender._send_all()
        act(log, 1)
        await log.settled()
        log.close()
    (left,) = (audited.home.audit / "gateway").glob("*/")
    assert (left / "spool").stat().st_size
    (left / "spool").write_bytes(b"")
    async with writer(audited) as (_, log):
        await written(log, 2, 1)
        await wait_until(lambda: log._sender is not None and not log._sender.cuts, "the cut is in a checkpoint")
        await sent(log)
    async with connect(audited.settings, audited.home, "dispatcher") as bus:
        assert await numbers(bus, audited.home) == [0, 2]
        report = check(audited.home, await everything(bus, audited.home))
    assert report.problems == ()
    assert [left.name in note for note in report.notes if "lost at its end" in note] == [True]
