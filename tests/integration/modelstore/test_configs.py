"""What gateways know of how each model is to be served."""

from __future__ import annotations

from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.configs import configure, unconfigure
from support.platform.services import Services

from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.gateway_http import gateway
from tether.model.config import ModelConfig, Shadow, default_config
from tether.process import metrics
from tether.wire import codec


def refused(code: str) -> float:
    return float(metrics.ENVELOPES_REJECTED.labels(code)._value.get())


async def test_a_models_configuration_reaches_every_gateway_and_leaves_them_when_it_is_deleted(one: Services) -> None:
    other = await one.stack.enter_async_context(gateway.running(one.settings, one.home))
    told: list[str] = []
    other.catalog.on_change(told.append)
    assert other.catalog.config("a.b") == default_config("a.b")
    config = ModelConfig("a.b", revision=1, cache_ttl_s=5.0, shadows=(Shadow(2, 10.0),))
    await configure(one, config)
    await wait_until(lambda: other.catalog.config("a.b") == config, "the other gateway has it")
    late = await one.stack.enter_async_context(gateway.running(one.settings, one.home))
    assert late.catalog.config("a.b") == config
    await unconfigure(one, "a.b")
    await wait_until(lambda: other.catalog.config("a.b") == default_config("a.b"), "it is gone there too")
    assert told == ["a.b", "a.b"]


async def test_who_listens_hears_of_versions_that_went_and_not_of_new_ones(one: Services) -> None:
    catalog, told = one.gateway.catalog, list[str]()
    catalog.on_change(told.append)
    first = await one.push("heard", models.add())
    assert catalog.find("heard", 1) == first
    assert (catalog.find("heard", 2), catalog.find("unheard", 1), told) == (None, None, [])
    async with connect(one.settings, one.home, "modelstore") as bus:
        await SignedBucket(bus, "models", MessageType.MANIFEST).delete(bus.names.version_key("heard", 1))
    await wait_until(lambda: told == ["heard"], "the listener was told")
    assert catalog.find("heard", 1) is None


async def test_a_configuration_counts_only_from_the_model_store_at_its_own_key_and_going_forward(one: Services) -> None:
    first, second = (ModelConfig("kept", revision=number, cache_ttl_s=float(number)) for number in (1, 2))
    names, catalog = one.bus.names, one.gateway.catalog
    await configure(one, first)
    async with connect(one.settings, one.home, "modelstore") as bus:
        bucket = KvBucket(bus, "configs")
        old = await bucket.get("kept")
        assert old is not None
        await configure(one, second)
        for key, what in (("other", "of another key"), ("kept", "that was replaced")):
            before = refused("stale_entry")
            await bucket.put(key, old)
            await wait_until(lambda before=before: refused("stale_entry") > before, f"one {what} is refused")
        forged = one.bus.signer.sign_envelope(
            MessageType.CONFIG, names.bucket_key("configs", "kept"), codec.encode(first)
        )
        before = refused("role_not_allowed")
        await bucket.put("kept", forged)
        await wait_until(lambda: refused("role_not_allowed") > before, "one that a gateway signed is refused")
        await SignedBucket(bus, "configs", MessageType.CONFIG).put("kept", b"\x01")
        await SignedBucket(bus, "configs", MessageType.CONFIG).put("said", codec.encode(ModelConfig("hidden")))
        last = ModelConfig("last", revision=7)
        await configure(one, last)
    assert (catalog.config("kept"), catalog.config("other")) == (second, default_config("other"))
    assert catalog.config("hidden") == default_config("hidden")


async def test_configurations_outlive_the_broker_and_are_followed_after_it_is_back(
    restartable: tuple[Broker, Services],
) -> None:
    broker, running = restartable
    await configure(running, ModelConfig("lasting", revision=1, cache_ttl_s=1.0))
    assert broker.server is not None
    await broker.server.kill()
    await broker.server.start()
    assert await running.bus.wait_connected(20)
    assert running.gateway.catalog.config("lasting").cache_ttl_s == 1.0
    await configure(running, ModelConfig("lasting", revision=2, cache_ttl_s=2.0))
