"""What becomes of stored entries when the key that signed them is rotated or revoked."""

from __future__ import annotations

from brokers import Broker

from tether.bus import identities
from tether.bus.connection import Bus
from tether.bus.keys import RootKey
from tether.bus.kv import SignedBucket
from tether.bus.topology import ensure_platform
from tether.envelope import MessageType
from tether.home import Home

WAIT_S = 5.0


def root(home: Home) -> RootKey:
    return RootKey(home.root_key)


async def prepared(broker: Broker) -> None:
    async with Bus.connect(broker.settings, broker.home, "dispatcher", follow=False) as dispatcher:
        await ensure_platform(dispatcher, broker.settings)


async def test_entries_outlive_the_rotation_of_the_key_that_signed_them(broker: Broker) -> None:
    await prepared(broker)
    cases = [
        ("gateway", "apikeys", MessageType.API_KEY),
        ("gateway", "tenants", MessageType.TENANT),
        ("modelstore", "models", MessageType.MANIFEST),
        ("modelstore", "aliases", MessageType.ALIAS),
    ]
    for name, bucket, kind in cases:
        async with Bus.connect(broker.settings, broker.home, name, follow=False) as bus:
            await SignedBucket(bus, bucket, kind).put("a", b"before")
    for name in ("gateway", "modelstore"):
        identities.rotate(broker.home, root(broker.home), name, grace_s=0)
    async with Bus.connect(broker.settings, broker.home, "gateway", follow=False) as bus:
        for _, bucket, kind in cases:
            assert await SignedBucket(bus, bucket, kind).get("a") == b"before", bucket
