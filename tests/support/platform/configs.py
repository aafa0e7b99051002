"""Configurations of models, written as the model store writes them."""

from __future__ import annotations

from support.brokers.brokers import wait_until
from support.platform.services import Services

from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.model.config import ModelConfig, check_config, default_config
from tether.wire import codec
from tether.wire.subjects import token


async def configure(running: Services, config: ModelConfig) -> None:
    """Sign and store a configuration, and wait until the gateway goes by it."""
    async with connect(running.settings, running.home, "modelstore") as bus:
        bucket = SignedBucket(bus, "configs", MessageType.CONFIG)
        await bucket.put(token(config.model), codec.encode(check_config(config)))
    await wait_until(
        lambda: running.gateway.catalog.config(config.model) == config, "the gateway has the configuration"
    )


async def unconfigure(running: Services, model: str) -> None:
    """Remove a model's configuration, and wait until the gateway goes by the defaults."""
    async with connect(running.settings, running.home, "modelstore") as bus:
        await SignedBucket(bus, "configs", MessageType.CONFIG).delete(token(model))
    default = default_config(model)
    await wait_until(lambda: running.gateway.catalog.config(model) == default, "the gateway has the defaults")
