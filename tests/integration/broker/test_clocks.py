"""Machines whose clocks are apart: what is tolerated, what is refused, and who says so."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest
from support.brokers.brokers import Broker, embedded, temporary_home, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.broker.embedded_server import Binary
from tether.bus import connection as link
from tether.bus import session
from tether.domain.job import JobState
from tether.identity import keys
from tether.process import lifecycle
from tether.process.clock import SystemClock
from tether.process.data_dir import Home

TOLERATED_S = (-20.0, 20.0)


class Shifted(SystemClock):
    """A machine's clock that is off by ``by_s``; set back to 0 by whoever sets the clock."""

    by_s = 0.0

    def utc(self) -> float:
        return super().utc() + self.by_s

    def utc_ms(self) -> int:
        return super().utc_ms() + int(self.by_s * 1000)


@contextmanager
def clock_off(by_s: float) -> Iterator[type[Shifted]]:
    """Connections that are made in the block go by a clock that is off."""

    class Here(Shifted):
        pass

    Here.by_s = by_s
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SystemClock", Here)
        patch.setattr(link, "SystemClock", Here)
        yield Here


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.fixture
def old_home() -> Iterator[Home]:
    """A home whose keys have been in force for an hour: of younger ones a clock that is behind says that they are not yet valid."""
    with pytest.MonkeyPatch.context() as patch:
        Shifted.by_s = -3600.0
        patch.setattr(keys, "SystemClock", Shifted)
        with temporary_home(workers=1) as home:
            yield home


@pytest.fixture
async def none(old_home: Home, nats_binary: Binary) -> AsyncIterator[Services]:
    """All services but a worker."""
    async with embedded(old_home, nats_binary) as broker, services(broker, workers=0) as running:
        yield running


@pytest.mark.parametrize("by_s", TOLERATED_S)
async def test_a_worker_whose_clock_is_20_s_off_joins_answers_and_tells_times_that_fit(
    none: Services, by_s: float
) -> None:
    with clock_off(by_s):
        worker = await none.start_worker("worker-1")
    assert worker.checks()["registration"] == "ok"
    served = await none.push("bump", models.add(1.0))
    assert (await none.infer(served, row(1.0), timeout_s=10.0))[0, 0] == 2.0
    (job,) = await none.gateway.jobs.submit(TENANT, [new_job(served, row(2.0), deadline_s=10.0)])
    (shown,) = await none.gateway.jobs.get_many(TENANT, [job["id"]], 20.0)
    assert shown["state"] == JobState.SUCCEEDED
    submitted, started, finished = (seconds(shown[f"{what}_at"]) for what in ("submitted", "started", "finished"))
    assert submitted <= started <= finished <= none.bus.clock.utc() + 0.5


@pytest.mark.parametrize(
    ("by_s", "says"),
    [
        (-60.0, r"could not register: this machine's clock is (59|60|61) s behind that of 'dispatcher'"),
        (60.0, r"could not register: your clock is (59|60|61) s ahead of that of this service"),
    ],
)
async def test_a_worker_whose_clock_is_60_s_off_is_refused_says_so_at_once_and_joins_when_it_is_set(
    none: Services, caplog: pytest.LogCaptureFixture, by_s: float, says: str
) -> None:
    caplog.set_level(logging.WARNING)
    with clock_off(by_s) as clock:
        joining = asyncio.create_task(none.start_worker("worker-1"))
        await wait_until(lambda: "set the clocks" in lifecycle.waits().get("registration", ""), "its health says why")
        own = [record.message for record in caplog.records if record.name == "tether.worker.registration"]
        assert len(own) == 1
        assert re.search(says, own[0]), own[0]
        clock.by_s = 0.0
        worker = await asyncio.wait_for(joining, 20)
    assert worker.checks()["registration"] == "ok"
    assert "registration" not in lifecycle.waits()


async def test_the_dispatcher_does_not_believe_heartbeats_of_a_worker_whose_clock_is_off_and_the_worker_says_so(
    none: Services, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.worker.registration._CONFIRM_S", 0.2)
    caplog.set_level(logging.WARNING)
    with clock_off(0.0) as clock:
        worker = await none.start_worker("worker-1")
    assert none.dispatcher is not None
    clock.by_s = 60.0
    await wait_until(lambda: "s ahead of" in worker.checks()["registration"], "its health says why")
    await wait_until(lambda: not none.dispatcher._living(), "it counts as away", 20)
    clock.by_s = 0.0
    await wait_until(lambda: worker.checks()["registration"] == "ok", "its registration counts")
    await wait_until(lambda: bool(none.dispatcher._living()), "it is back")
    assert worker.registrar.epoch == none.dispatcher._epochs["worker-1"]


async def test_a_clock_that_is_behind_young_keys_is_named_too(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with services(broker, workers=0) as running:
        with clock_off(-300.0) as clock:
            joining = asyncio.create_task(running.start_worker("worker-1"))
            await wait_until(lambda: "machine's clock is that much behind" in caplog.text, "its log says why")
            clock.by_s = 0.0
            await asyncio.wait_for(joining, 20)
