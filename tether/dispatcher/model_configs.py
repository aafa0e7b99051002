"""Mirror of model configurations and aliases in the dispatcher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket, read_entry
from tether.bus.key_value.model_owners import OwnerBook
from tether.crypto import MessageType
from tether.dispatcher import serving_policy
from tether.dispatcher.assignments import Models, Place
from tether.domain.manifest import Alias, Route
from tether.model.config import ModelConfig
from tether.wire.subjects import name_of, token


class ModelConfigMirror:
    """Follows the buckets ``configs`` and ``aliases``; ``changed`` is called after every change."""

    def __init__(self, bus: Bus, changed: Callable[[], None]) -> None:
        self._bus = bus
        self._changed = changed
        self.owners = OwnerBook()
        self.configs: dict[str, ModelConfig] = {}
        self._aliases: dict[str, dict[str, Alias]] = {}
        self._wanted = serving_policy.RecentlyServed()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Read both buckets, and follow them until the block ends."""
        configs = SignedBucket(self._bus, "configs", MessageType.CONFIG)
        aliases = SignedBucket(self._bus, "aliases", MessageType.ALIAS)
        async with (
            configs.watch(self._config_changed, on_refused=self.owners.refused),
            aliases.watch(self._alias_changed),
        ):
            yield

    def _config_changed(self, key: str, body: bytes | None) -> None:
        if self.owners.config_changed(key, body):
            return self._changed()
        config = None if body is None else read_entry(body, ModelConfig)
        if body is None:
            self.configs.pop(name_of(key), None)
        elif config is not None and key == token(config.model):
            self.configs[config.model] = config
        return self._changed()

    def _alias_changed(self, key: str, body: bytes | None) -> None:
        alias = None if body is None else read_entry(body, Alias)
        if body is None:
            model, _, name = key.partition(".")
            self._aliases.get(name_of(model), {}).pop(name_of(name), None)
        elif alias is not None and key == f"{token(alias.model)}.{token(alias.name)}":
            self._aliases.setdefault(alias.model, {})[alias.name] = alias
        self._changed()

    def revisions(self) -> dict[str, int]:
        """Return the current configuration revision of each model that has one."""
        return {model: config.revision for model, config in self.configs.items()}

    def served(self, models: Models, routes: Mapping[Place, Route]) -> Models:
        """Return the versions of every pool that its workers should host now."""
        aliases = {model: named.values() for model, named in self._aliases.items()}
        wanted = serving_policy.served(models, self.configs, aliases, routes)
        return self._wanted.lingering(wanted, models, self._bus.clock.monotonic())
