"""Tenants with workers of their own, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec
from support.brokers.brokers import temporary_home, wait_until
from support.platform.services import Services

from tether.bus.bus import Bus
from tether.crypto import MessageType, Role, new_identity, sign_keyset
from tether.domain.job import Lane
from tether.domain.tenant import Tenant
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.identity.keys import create_home, read_keyset
from tether.process.data_dir import Home, read_secret, save_identity, write_secret
from tether.streams.job_queue import BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.wire import codec


def bind_worker(home: Home, name: str, tenant: str) -> None:
    """Make a worker identity that serves one isolated tenant. The broker must not run yet: it reads logins at start."""
    save_identity(home.identity(name), new_identity(name, Role.WORKER))
    create_home(home, workers=1)
    keyset = read_keyset(home)
    records = tuple(
        msgspec.structs.replace(record, tenant=tenant) if record.name == name else record
        for record in keyset.identities
    )
    bound = msgspec.structs.replace(keyset, version=keyset.version + 1, identities=records)
    write_secret(home.keyset, sign_keyset(read_secret(home.root_key), bound))


@contextlib.contextmanager
def bound_home(**bound: str) -> Iterator[Home]:
    """A home with a worker identity for each tenant: ``own="acme"`` binds the worker ``own`` to ``acme``."""
    with temporary_home() as home:
        for name, tenant in bound.items():
            bind_worker(home, name, tenant)
        yield home


async def isolate(running: Services, name: str, served: ResolvedVersion | None = None, **changes: object) -> None:
    """Make a tenant an isolated one, and wait until it has lanes for a model."""
    record = msgspec.structs.replace(Tenant(name, isolated=True), **changes)
    await running.gateway.tenants.store(record)
    if served is not None:
        await wait_until(lambda: has_lane(running, served, name), f"'{name}' has lanes")


def has_lane(running: Services, served: ResolvedVersion, pool: str) -> bool:
    return (served.manifest.name, served.manifest.version, pool) in running.gateway.catalog._routes


async def own_worker(running: Services, name: str, served: ResolvedVersion, tenant: str) -> None:
    """Start a tenant's worker and wait until it answers for a model."""
    await running.start_worker(name)
    await wait_until(lambda: running.gateway.catalog.workers(served, tenant) == (name,), f"'{name}' holds the model")


async def ended_by(running: Services, ids: Sequence[str], pool: str) -> set[str]:
    """Which workers stored results of these jobs."""
    frames = await BusResults(running.bus).find(ids, pool=pool)
    assert len(frames) == len(ids)
    found = set()
    for job, frame in frames.items():
        envelope = running.bus.verify_frame(frame, running.bus.names.result(job, pool), MessageType.RESULT)
        assert envelope is not None
        (outcome,) = codec.decode_outcomes(envelope.body)
        assert outcome.worker == envelope.sender
        found.add(outcome.worker)
    return found


@dataclass
class Thief:
    """Takes bundles of a lane and keeps them."""

    bus: Bus
    lane: Lane
    got: list[Delivery] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self.pull = LaneConsumer(self.bus, self.lane, 8, self.got.append)
        await self.pull.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pull.stop()
