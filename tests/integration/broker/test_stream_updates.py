"""Streams that are there and not as the settings want them: services leave them as they are, and an administrator changes them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging

import pytest
from support.brokers.brokers import Broker, embedded, wait_until
from support.brokers.operators import operator, reconfigure
from support.models import models
from support.platform.services import Services, new_job, row, services
from support.platform.tenancy import bound_home, isolate
from typer.testing import CliRunner

from tether.broker.embedded_server import Binary
from tether.broker.permissions import OWN_RIGHTS
from tether.bus.session import connect
from tether.crypto import Role
from tether.settings import Settings
from tether.streams.layout import ensure_platform
from tether.streams.updates import differing_streams, update_streams
from tether_cli.main import application
from tether_cli.platform.broker_streams import bring_up_to_date
from tether_cli.platform.doctor import _permissions


async def test_a_dispatcher_leaves_a_stream_as_it_is_says_so_once_and_goes_on(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    larger = dataclasses.replace(broker.settings, max_file_mb=broker.settings.max_file_mb * 2)
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        await ensure_platform(bus, broker.settings)
    with caplog.at_level(logging.WARNING):
        async with services(dataclasses.replace(broker, settings=larger), workers=1) as running:
            await goes_on(running)
            stream = running.bus.names.jobs_stream(0)
            told = [
                record.getMessage() for record in caplog.records if f"{stream} was not changed" in record.getMessage()
            ]
            assert len(told) == 1
            assert "max_bytes" in told[0]
            assert "tether streams --apply" in told[0]
            async with connect(larger, broker.home, "admin") as admin:
                assert stream in await differing_streams(admin, larger)


async def goes_on(running: Services) -> None:
    assert running.dispatcher is not None
    dispatcher = running.dispatcher
    served = await running.push("bump", models.add())
    for _ in range(2):  # also after it has looked at them again
        dispatcher.streams.reset()
        await wait_until(lambda: dispatcher.checks()["streams"] == "ok", "the streams are looked at")
    (job,) = await running.gateway.jobs.submit("acme", [new_job(served, row(1))])
    assert (await running.gateway.jobs.get("acme", job["id"], 20))["state"] == "succeeded"


async def test_an_administrator_changes_streams_those_of_isolated_tenants_too(nats_binary: Binary) -> None:
    with bound_home(own="acme") as home:
        async with embedded(home, nats_binary) as broker, services(broker, workers=1) as running:
            await isolate(running, "acme", await running.push("bump", models.add()))
            own, shared = running.bus.names.pool_jobs_stream("acme"), running.bus.names.results_stream
            for stream in (own, shared):
                await reconfigure(home, broker.settings, stream, max_bytes=1 << 20)
            async with connect(broker.settings, home, "admin") as admin:
                assert await differing_streams(admin, broker.settings) == {own: ["max_bytes"], shared: ["max_bytes"]}
                assert set(await update_streams(admin, broker.settings)) == {own, shared}
                assert await update_streams(admin, broker.settings) == {}


async def test_the_command_shows_and_changes_them_and_so_does_the_start_of_a_platform(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether_cli.commands.platform._quiet", lambda: None)
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        await ensure_platform(bus, broker.settings)
        stream = bus.names.dead_stream

        async def most() -> int:
            return int((await bus.api(f"STREAM.INFO.{stream}"))["config"]["max_bytes"])

        async def asked(*words: str) -> tuple[int, dict[str, list[str]]]:
            place = ("--data-dir", str(broker.home.root), "--nats", broker.url)
            answer = await asyncio.to_thread(CliRunner().invoke, application(), ["streams", *place, "--json", *words])
            assert answer.stdout, answer.exception
            return answer.exit_code, json.loads(answer.stdout)

        assert await asked() == (0, {})
        before = await most()
        monkeypatch.setenv("TETHER_MAX_FILE_MB", str(broker.settings.max_file_mb // 2))
        code, found = await asked()
        assert (code, found[stream], await most()) == (1, ["max_bytes"], before)
        assert await asked("--apply") == (0, found)
        assert await most() == before // 2
        assert await asked() == (0, {})
        monkeypatch.setenv("TETHER_MAX_FILE_MB", str(broker.settings.max_file_mb))
        await bring_up_to_date(Settings(home=str(broker.home.root)), broker.url)
        assert await most() == before


@pytest.mark.parametrize(
    ("role", "before"),
    [(Role.DISPATCHER, "$JS.API.STREAM.UPDATE.*"), (Role.WORKER, "$JS.API.DIRECT.GET.TETHER_RESULTS")],
)
async def test_the_doctor_finds_a_broker_with_the_lists_of_before(
    embedded_broker: Broker, role: Role, before: str
) -> None:
    home, settings = embedded_broker.home, embedded_broker.settings
    assert (await _permissions(settings, home, role)).level == "ok"
    name = "worker-1" if role is Role.WORKER else role.value
    head, mark, rest = home.nats_config.read_text().partition(f"{{ # {name}\n")
    home.nats_config.write_text(head + mark + rest.replace("allow: [", f'allow: [ "{before}"', 1))
    async with operator(home, settings):  # once it is in, the broker has read the file
        found = await _permissions(settings, home, role)
    assert found.level == "fail"
    assert "ops/nats/permissions.conf" in found.line()


async def test_the_doctor_leaves_no_error_in_the_brokers_log(embedded_broker: Broker) -> None:
    home, settings = embedded_broker.home, embedded_broker.settings
    for role in Role:
        assert (await _permissions(settings, home, role)).level == "ok"
    log = (home.logs / "nats.log").read_text()
    assert "[INF]" in log
    assert "[ERR]" not in log


async def test_the_doctor_tries_out_a_broker_whose_lists_do_not_let_it_ask(embedded_broker: Broker) -> None:
    home, settings = embedded_broker.home, embedded_broker.settings
    home.nats_config.write_text(home.nats_config.read_text().replace(f'"{OWN_RIGHTS}"', ""))
    async with operator(home, settings):
        assert (await _permissions(settings, home, Role.WORKER)).level == "ok"
    assert f'Publish Violation - Subject "{OWN_RIGHTS}"' in (home.logs / "nats.log").read_text()
