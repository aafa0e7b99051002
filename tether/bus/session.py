"""Connects a service to the broker as one identity, and keeps its keyset up to date."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from tether.bus.bus import Bus
from tether.bus.key_value.keyset_sync import TrustedKeyset, following, standing
from tether.bus.tls import client_context
from tether.crypto import Signer, Verifier
from tether.errors import KeyRevoked
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, load_identity, read_secret
from tether.settings import Settings
from tether.wire.subjects import Names


@asynccontextmanager
async def connect(settings: Settings, home: Home, identity: str, *, follow: bool = True) -> AsyncIterator[Bus]:
    """Connect as ``identity``, whose key files are in ``home``. The connection reconnects forever.

    It follows the newest keyset, unless ``follow`` is off: for a connection that verifies nothing.

    Raises:
        KeyRevoked: the key of ``identity`` is revoked.
        ConfigError: key files are missing or readable by others, or the broker refuses this identity.
        BrokerUnavailable: no broker answers at ``settings.nats_url``.
    """
    bus, newest = prepare(settings, home, identity)
    seed = read_secret(home.nats_seed(identity)).decode().strip()
    await bus.open_connection(seed, client_context(settings, home))
    try:
        async with following(bus, home, home.identity(identity), newest) if follow else nullcontext():
            yield bus
    finally:
        await bus.close()


def prepare(settings: Settings, home: Home, identity: str) -> tuple[Bus, TrustedKeyset]:
    """Read keys and keyset, without network access."""
    clock = SystemClock()
    newest = TrustedKeyset.load(home)
    if not home.identity(identity).exists() and (gone := newest.revoked(identity)) is not None:
        raise gone
    own = load_identity(home.identity(identity))
    problem = standing(newest.keyset, own.kid, own.name, clock.utc_ms())
    if isinstance(problem, KeyRevoked):
        raise problem
    names = Names(settings.prefix, partitions=settings.partitions)
    bus = Bus(settings, names, Signer(own, clock.utc_ms), Verifier(newest.keyset, clock.utc_ms))
    bus.pool = bus.bound_pool()
    return bus, newest
