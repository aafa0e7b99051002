"""The keyset while services run: what they believe, what they refuse, how soon, and what a restart brings back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import nacl.signing
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import Services, row

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.keyset_sync import CURRENT, SETTLE_S, TrustedKeyset, offer, standing
from tether.bus.session import connect
from tether.crypto import KEYSET_DOMAIN, Keyset, Role, sign_keyset
from tether.errors import KeyExpired, KeyRevoked, KeysetError, PermissionDenied, UnknownKey
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.process import metrics
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, load_identity
from tether.streams.layout import ensure_platform

SOON_S = 2.0


def root(home: Home) -> RootKey:
    return RootKey(home.root_key)


def signed(home: Home, keyset: Keyset) -> bytes:
    return sign_keyset(home.root_key.read_bytes(), keyset)


@contextlib.asynccontextmanager
async def administrator(broker: Broker) -> AsyncIterator[Bus]:
    async with connect(broker.settings, broker.home, "admin", follow=False) as bus:
        yield bus


async def publish(broker: Broker) -> None:
    async with administrator(broker) as bus:
        await offer(bus, TrustedKeyset.load(broker.home))


async def in_bucket(bus: Bus) -> bytes | None:
    return await KvBucket(bus, "keyset").get(CURRENT)


async def published(broker: Broker, one: Services) -> None:
    await wait_until(lambda: _is_published(broker, one), "the dispatcher fills the bucket", SOON_S)


async def _is_published(broker: Broker, one: Services) -> bool:
    return await in_bucket(one.bus) == broker.home.keyset.read_bytes()


def refusals(reason: str) -> float:
    return float(metrics.KEYSETS_REFUSED.labels(reason)._value.get())


async def test_the_dispatcher_fills_the_bucket_and_everybody_hears_of_a_newer_keyset(
    broker: Broker, one: Services, caplog: pytest.LogCaptureFixture
) -> None:
    await published(broker, one)
    keyset_editor.add(broker.home, root(broker.home), "worker-9", Role.WORKER)
    buses = [one.bus, one.workers[0]._bus]
    with caplog.at_level(logging.INFO):
        began = time.monotonic()
        await publish(broker)
        await wait_until(lambda: all(bus.verifier.keyset.version == 2 for bus in buses), "version 2 counts", SOON_S)
    assert time.monotonic() - began < SOON_S
    assert "new: worker-9" in caplog.text


async def test_a_keyset_in_the_file_reaches_the_bucket_without_an_administrator(broker: Broker, one: Services) -> None:
    keyset_editor.add(broker.home, root(broker.home), "worker-9", Role.WORKER)
    await published(broker, one)
    await wait_until(lambda: one.bus.verifier.keyset.version == 2, "the gateway goes by it", SOON_S)


@pytest.mark.parametrize("case", ["unsigned", "wrong root", "undecodable", "older", "conflict", "expired"])
async def test_what_may_not_be_believed_is_refused_and_the_old_keyset_stays(
    broker: Broker, one: Services, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    home, now = broker.home, SystemClock().utc_ms()
    older = home.keyset.read_bytes()
    keyset_editor.add(home, root(home), "worker-9", Role.WORKER)
    await published(broker, one)
    await wait_until(lambda: one.bus.verifier.keyset.version == 2, "version 2", SOON_S)
    keyset = one.bus.verifier.keyset
    data, reason = {
        "unsigned": (bytes(64) + older[64:], "unsigned"),
        "wrong root": (sign_keyset(os.urandom(32), msgspec.structs.replace(keyset, version=9)), "unsigned"),
        "undecodable": (_signed_map(home), "undecodable"),
        "older": (older, "older"),
        "conflict": (signed(home, msgspec.structs.replace(keyset, identities=keyset.identities[:-1])), "conflict"),
        "expired": (signed(home, msgspec.structs.replace(keyset, version=9, expires_at=now - 1)), "not_in_force"),
    }[case]
    before, file = refusals(reason), home.keyset.read_bytes()
    async with administrator(broker) as bus:
        await KvBucket(bus, "keyset").put(CURRENT, data)
    await wait_until(lambda: refusals(reason) > before, "a refusal is counted", SOON_S)
    await published(broker, one)  # the dispatcher puts back what it believes
    assert "keyset_refused" in {getattr(record, "action", "") for record in caplog.records}
    assert one.bus.verifier.keyset == keyset
    assert home.keyset.read_bytes() == file
    with pytest.raises(KeysetError):
        TrustedKeyset.load(home).newer(data, now)


def _signed_map(home: Home) -> bytes:
    body = b"\x81\xa7version\x01"
    return nacl.signing.SigningKey(home.root_key.read_bytes()).sign(KEYSET_DOMAIN + body).signature + body


async def test_a_restart_brings_no_older_keyset_back(broker: Broker) -> None:
    """A machine with a home of its own hears of a newer keyset, ends, and starts where only an older one is offered."""
    home = broker.home
    other = Home(keyset_editor.export(home, "worker-1", home.root / "elsewhere"))
    older = home.keyset.read_bytes()
    async with connect(broker.settings, home, "dispatcher", follow=False) as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
    async with connect(broker.settings, other, "worker-1") as worker:
        keyset_editor.add(home, root(home), "worker-9", Role.WORKER)
        await publish(broker)
        await wait_until(lambda: worker.verifier.keyset.version == 2, "the worker hears of it", SOON_S)
    async with administrator(broker) as bus:
        await KvBucket(bus, "keyset").put(CURRENT, older)
    before = refusals("older")
    async with connect(broker.settings, other, "worker-1") as worker:
        assert worker.verifier.keyset.version == 2
        await wait_until(lambda: refusals("older") > before, "the older one is refused", SOON_S)
        assert worker.verifier.keyset.version == 2


async def test_only_administrator_and_dispatcher_may_write_the_bucket(broker: Broker, one: Services) -> None:
    for bus in (one.bus, one.workers[0]._bus):
        with pytest.raises(PermissionDenied):
            await KvBucket(bus, "keyset").put(CURRENT, b"x")


async def test_a_revoked_worker_stops_and_no_request_fails(
    broker: Broker, one: Services, record_property: Callable[[str, object], None]
) -> None:
    served = await one.push("m", models.add(1.0))
    second = await one.start_worker("worker-2")
    await wait_until(lambda: len(one.gateway.catalog.workers(served)) == 2, "both workers hold the model")
    first, kid = one.workers[0], load_identity(broker.home.identity("worker-1")).kid
    stop = asyncio.Event()
    answered = asyncio.create_task(_asking(one, served, stop))
    keyset_editor.revoke(broker.home, root(broker.home), "worker-1")
    began = time.monotonic()
    await publish(broker)
    await wait_until(first.closed.is_set, "the worker stops", SOON_S)
    assert isinstance(first.closed.reason, KeyRevoked)
    await wait_until(lambda: kid not in one.bus.verifier._trusted.keys, "its key counts no more", SOON_S)
    took = time.monotonic() - began
    record_property("milliseconds_to_revoke", round(1000 * took))
    assert took < SOON_S
    await first.holder.stop(5.0)
    stop.set()
    assert await answered > 0
    assert not second.closed.is_set()


async def _asking(one: Services, served: object, stop: asyncio.Event) -> int:
    """Ask without pause until told to stop; how many answers came. A failed request fails the test."""
    count = 0
    while not stop.is_set():
        answer = await one.infer(served, row(float(count % 7)))  # type: ignore[arg-type]
        assert answer[0, 0] == float(count % 7) + 1.0
        count += 1
    return count


@pytest.mark.parametrize("name", ["worker-1", "gateway", "dispatcher", "modelstore"])
async def test_a_rotated_identity_signs_with_its_new_key_and_nothing_fails(
    broker: Broker, one: Services, name: str, record_property: Callable[[str, object], None]
) -> None:
    served = await one.push("m", models.add(1.0))
    await published(broker, one)
    stop = asyncio.Event()
    answered = asyncio.create_task(_asking(one, served, stop))
    made = keyset_editor.rotate(broker.home, root(broker.home), name, grace_s=3600)
    began = time.monotonic()
    await publish(broker)
    bus = {"gateway": one.bus, "worker-1": one.workers[0]._bus}.get(name)
    if bus is not None:
        await wait_until(lambda: bus.signer.kid == made.kid, "it signs with its new key", SOON_S)
        record_property("milliseconds_to_rotate", round(1000 * (time.monotonic() - began)))
    await one.push("n", models.add(2.0))  # every role has a part in this
    stop.set()
    assert await answered > 0


async def test_an_identity_whose_old_key_is_over_stops_unless_it_has_the_new_one(broker: Broker) -> None:
    home = broker.home
    other = Home(keyset_editor.export(home, "worker-1", home.root / "elsewhere"))
    async with connect(broker.settings, home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
        async with (
            connect(broker.settings, other, "worker-1") as left,
            connect(broker.settings, home, "worker-1") as right,
        ):
            made = keyset_editor.rotate(home, root(home), "worker-1", grace_s=0)
            await publish(broker)
            await wait_until(left.closed.is_set, "the one without the new key stops", SOON_S)
            assert isinstance(left.closed.reason, KeyExpired)
            await wait_until(lambda: right.signer.kid == made.kid, "the other signs with it", SOON_S)
            assert not right.closed.is_set()


async def test_an_identity_that_no_keyset_knows_yet_waits_for_one_that_does(broker: Broker) -> None:
    home = broker.home
    old = home.keyset.read_bytes()
    keyset_editor.rotate(home, root(home), "worker-1")
    other = Home(keyset_editor.export(home, "worker-1", home.root / "elsewhere"))
    other.keyset.write_bytes(old)
    async with connect(broker.settings, home, "dispatcher") as dispatcher:
        await ensure_platform(dispatcher, broker.settings)
        async with connect(broker.settings, other, "worker-1") as worker:
            assert isinstance(_standing(worker), UnknownKey)
            await wait_until(lambda: _standing(worker) is None, "the keyset comes from the bucket", SOON_S + SETTLE_S)
            assert not worker.closed.is_set()


def _standing(bus: Bus) -> Exception | None:
    return standing(bus.verifier.keyset, bus.signer.kid, bus.signer.name, bus.clock.utc_ms())
