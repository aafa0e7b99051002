"""What an identity may not do is refused at once, and by name (S25); what a reload takes away is gone at once."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from support.brokers.brokers import Broker, embedded, wait_until
from support.brokers.logins import OWN, Logins, add_bound_worker, connected, revoke

from tether.broker.embedded_server import Binary, reload_embedded
from tether.bus import rpc
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.errors import ConfigError, KeyRevoked, PermissionDenied
from tether.process.data_dir import Home
from tether.settings import Settings


@pytest.fixture
async def logins(home: Home, nats_binary: Binary) -> AsyncIterator[Logins]:
    add_bound_worker(home)
    async with embedded(home, nats_binary) as broker, connected(broker) as made:
        yield made


async def ignore(_: object) -> None:
    """Nothing arrives here."""


async def watch_all(bus: Bus, bucket: str) -> dict[str, bytes | None]:
    """What a watch of the whole bucket sees first."""
    seen: dict[str, bytes | None] = {}
    async with KvBucket(bus, bucket).watch(seen.__setitem__):
        return seen


async def test_a_denial_is_said_at_once_and_names_the_subject(logins: Logins) -> None:
    """Of a publish, a JetStream call, a read, a request, a subscription and a watch; none waits for its timeout."""
    worker, names = logins.worker, logins.worker.names
    started = asyncio.get_running_loop().time()
    model, tenants = names.bucket_key("models", "M.1"), "$JS.API.DIRECT.GET.KV_TETHER_tenants"
    other, push = "_INBOX.tether.worker.worker-2.>", MessageType.REGISTER
    refused: dict[str, Callable[[], Awaitable[object]]] = {
        model: lambda: worker.publish_acked(model, b"", timeout=60),
        "$JS.API.STREAM.PURGE.TETHER_JOBS_0": lambda: worker.api("STREAM.PURGE.TETHER_JOBS_0", timeout=60),
        tenants: lambda: worker.direct_last("KV_TETHER_tenants", ">", timeout=60),
        (owner := names.store_service("registerModel", 0, 1)): lambda: rpc.call(
            worker, "registerModel", push, b"", answers=push, timeout=60, subject=owner
        ),
        other: lambda: worker.subscribe(other, ignore),
        names.bucket_key("apikeys", ">"): lambda: watch_all(worker, "apikeys"),
    }
    for subject, attempt in refused.items():
        with pytest.raises(PermissionDenied, match="permission for") as caught:
            await attempt()
        assert caught.value.field == subject
    assert asyncio.get_running_loop().time() - started < 5


async def test_a_watch_of_what_may_be_heard_but_not_read_is_denied(logins: Logins) -> None:
    with pytest.raises(PermissionDenied, match="KV_TETHER_tenantkeys"):
        await watch_all(logins.worker, "tenantkeys")


async def test_a_revoked_identity_is_cut_off_at_once_and_nobody_else(logins: Logins) -> None:
    """It is disconnected, not let in again, and its process is told that it need not wait."""
    home, settings = logins.broker.home, logins.broker.settings
    losses = {name: getattr(logins, name).losses for name in ("gateway", "dispatcher", "worker", "own")}
    revoke(home, "worker-2")
    started = asyncio.get_running_loop().time()
    assert await asyncio.to_thread(reload_embedded, home, settings)
    await wait_until(lambda: not logins.other.connected, "the revoked worker is cut off")
    assert asyncio.get_running_loop().time() - started < 2
    await asyncio.wait_for(logins.other.closed.wait(), 5)
    assert {name: getattr(logins, name).losses for name in losses} == losses
    with pytest.raises(KeyRevoked, match="worker-2"):
        async with connect(settings, home, "worker-2"):
            pass
    gc.collect()


async def test_a_new_identity_can_log_in_after_a_reload(home: Home, nats_binary: Binary) -> None:
    async with embedded(home, nats_binary) as broker:
        add_bound_worker(home)
        with pytest.raises(ConfigError, match="refused"):
            async with connect(broker.settings, home, OWN):
                pass
        assert await asyncio.to_thread(reload_embedded, home, broker.settings)
        async with connect(broker.settings, home, OWN) as bus:
            with pytest.raises(PermissionDenied):
                await bus.publish_acked(bus.names.result("job"), b"of another pool")


def test_where_no_broker_runs_there_is_nothing_to_reload(home: Home) -> None:
    assert not reload_embedded(home, Settings(home=str(home.root)))


async def test_a_configuration_that_is_not_ours_is_left_alone(embedded_broker: Broker) -> None:
    home = embedded_broker.home
    home.nats_config.write_text("port: 1\n")
    with pytest.raises(ConfigError, match="changed by hand"):
        await asyncio.to_thread(reload_embedded, home, embedded_broker.settings)
    assert home.nats_config.read_text() == "port: 1\n"
