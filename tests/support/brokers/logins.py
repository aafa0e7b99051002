"""Identities at the broker, for tests that try what each may do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import msgspec
from support.brokers.brokers import Broker

from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto import Keyset, Revocation, Role, new_identity, sign_keyset
from tether.domain.job import Lane, LaneKind
from tether.identity.keys import make_nats_seed, nats_public_key, read_keyset
from tether.process.data_dir import Home, read_secret, save_identity, write_secret
from tether.streams.layout import ensure_lane, ensure_platform

OWN, TENANT = "own-1", "acme.eu"
"""A worker that is bound to an isolated tenant, and the tenant."""


def add_bound_worker(home: Home, name: str = OWN, tenant: str = TENANT) -> None:
    """Make a worker identity of an isolated tenant and sign it into the home's keyset."""
    identity = new_identity(name, Role.WORKER)
    save_identity(home.identity(name), identity)
    make_nats_seed(home, name)
    old = read_keyset(home)
    record = identity.record(
        not_before=old.not_before, expires_at=old.expires_at, tenant=tenant, nats=nats_public_key(home, name)
    )
    sign(home, msgspec.structs.replace(old, identities=(*old.identities, record)))


def revoke(home: Home, name: str) -> None:
    """Sign a keyset that revokes every key of an identity."""
    old = read_keyset(home)
    gone = tuple(Revocation(record.kid, name, old.not_before) for record in old.identities if record.name == name)
    sign(home, msgspec.structs.replace(old, revoked=(*old.revoked, *gone)))


def sign(home: Home, keyset: Keyset) -> None:
    """Write a keyset as the next version, signed by the home's root key."""
    newer = msgspec.structs.replace(keyset, version=keyset.version + 1)
    write_secret(home.keyset, sign_keyset(read_secret(home.root_key), newer))


@dataclass
class Logins:
    """One connection for each identity, and a lane that the dispatcher made."""

    broker: Broker
    dispatcher: Bus
    gateway: Bus
    modelstore: Bus
    worker: Bus
    other: Bus
    own: Bus
    """The worker of the isolated tenant."""
    lane: Lane


@asynccontextmanager
async def connected(broker: Broker) -> AsyncIterator[Logins]:
    """Everyone logged in, on a platform whose streams exist, those of the isolated tenant too."""
    names = ("dispatcher", "gateway", "modelstore", "worker-1", "worker-2", OWN)
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connect(broker.settings, broker.home, name)) for name in names]
        dispatcher, gateway, modelstore, worker, other, bound = buses
        lane = Lane(LaneKind.JOB, "m", 1)
        logins = Logins(broker, dispatcher, gateway, modelstore, worker, other, bound, lane)
        await ensure_platform(logins.dispatcher, broker.settings)
        for wanted in (lane, Lane(LaneKind.JOB, "m", 2)):
            await ensure_lane(logins.dispatcher, wanted, broker.settings)
        own = dispatcher.names
        stream, subject = own.pool_results_stream(TENANT), own.results(TENANT)
        await logins.dispatcher.api(
            f"STREAM.CREATE.{stream}",
            {"name": stream, "subjects": [subject], "allow_direct": True, "storage": "memory"},
        )
        yield logins
