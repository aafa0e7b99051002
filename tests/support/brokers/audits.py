"""Writing and reading the audit log in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.brokers.brokers import Broker
from support.platform.services import TENANT

from tether import audit
from tether.audit import Checker, Kind, Record, VerificationReport
from tether.audit import reader as audit_read
from tether.audit.reader import AuditReader, Filter, Found
from tether.audit.writer import AuditLog, writing
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto import body_of
from tether.process import lifecycle
from tether.process.data_dir import Home

WHO = "key:abcdefgh"


@asynccontextmanager
async def writer(broker: Broker, name: str = "gateway", **changes: object) -> AsyncIterator[tuple[Bus, AuditLog]]:
    settings = dataclasses.replace(broker.settings, **changes)  # type: ignore[arg-type]
    async with (
        connect(settings, broker.home, name) as bus,
        lifecycle.tasks() as tasks,
        writing(bus, broker.home, tasks) as log,
    ):
        yield bus, log


async def reader(bus: Bus, home: Home) -> AuditReader:
    return await audit_read.reader(bus, home)


async def entries(bus: Bus, home: Home, **wanted: object) -> list[Found]:
    found = (await reader(bus, home)).forward(Filter(**wanted), 1)  # type: ignore[arg-type]
    return [item async for item in found]


async def everything(bus: Bus, home: Home) -> list[Record]:
    return [record async for record in (await reader(bus, home)).records()]


def check(home: Home, records: list[Record], *, local: bool = True) -> VerificationReport:
    keys = audit_read.historical([home.keyset.read_bytes()], home.root_public.read_bytes())
    checker = Checker(keys, 365 * 86_400_000)
    left = audit_read.left_behind(home) if local else []
    for record in records:
        checker.add(record)
    known = audit_read.check_local(checker, left)
    return checker.finish(known=known)


def act(log: AuditLog, number: int, tenant: str = TENANT) -> None:
    log.record(Kind.ADMIN, tenant, actor=WHO, action="test", detail=str(number))


async def numbers(bus: Bus, home: Home) -> list[int]:
    return [int(found.entry.detail) for found in await entries(bus, home, kind=Kind.ADMIN)]


def marks(record: Record) -> list[audit.Mark]:
    """The rows of a checkpoint."""
    return audit.entries_of(audit.decode_block(body_of(record.frame)), audit.Mark)
