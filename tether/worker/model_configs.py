"""Follows the configurations of a worker's models without listing the bucket.

The dispatcher watches the bucket and sends the current revision of each model's configuration with the
assignment. The worker reads that one entry, signed by the model store, by its key.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.errors import BadEncoding, TetherError
from tether.model.config import ModelConfig, default_config
from tether.process.lifecycle import Tasks
from tether.wire import codec
from tether.wire.subjects import token

log = logging.getLogger(__name__)

_RETRY_S = (0.05, 0.2, 0.5, 2.0, 15.0)


class ModelConfigReader:
    """Configurations by model. ``changed`` is called with the name of a model whose configuration changed."""

    def __init__(self, bus: Bus, changed: Callable[[str], None]) -> None:
        self._bucket = SignedBucket(bus, "configs", MessageType.CONFIG)
        self._changed = changed
        self._known: dict[str, ModelConfig] = {}
        self._told: dict[str, int] = {}
        self._reading: set[str] = set()
        self._tasks = Tasks()

    def set_revisions(self, revisions: Iterable[tuple[str, int]]) -> None:
        """Set the current revisions; models that are not listed have no entry."""
        self._told = dict(revisions)
        for model in list(self._known):
            self._follow(model)

    def get(self, model: str) -> ModelConfig:
        """Return the configuration as last read."""
        return self._known.get(model) or default_config(model)

    async def read(self, model: str) -> ModelConfig:
        """Read the configuration from the broker before a load, and follow it from then on.

        Raises:
            BrokerUnavailable: the entry could not be read.
        """
        if model not in self._known:
            found = await self._entry(model)
            self._known.setdefault(model, found)
            self._follow(model)
        return self._known[model]

    def forget(self, model: str) -> None:
        """Stop following a model that is no longer hosted."""
        self._known.pop(model, None)

    async def stop(self) -> None:
        await self._tasks.cancel()

    def _behind(self, model: str) -> bool:
        known = self._known.get(model)
        return known is not None and known.revision != self._told.get(model, 0)

    def _follow(self, model: str) -> None:
        if self._behind(model) and model not in self._reading:
            self._reading.add(model)
            self._tasks.spawn(self._catch_up(model), f"config-{model}")

    async def _catch_up(self, model: str) -> None:
        """Read until the announced revision is there; an entry may be newer than announced."""
        try:
            for pause in itertools.chain(_RETRY_S, itertools.repeat(_RETRY_S[-1])):
                found = await self._newer(model)
                if found is not None and model in self._known:
                    self._known[model] = found
                    self._changed(model)
                if not self._behind(model) or self._known[model].revision > self._told.get(model, 0) > 0:
                    return
                await asyncio.sleep(pause)
        finally:
            self._reading.discard(model)

    async def _newer(self, model: str) -> ModelConfig | None:
        try:
            found = await self._entry(model)
        except TetherError as error:
            log.info(
                "could not read a model's configuration: %s", error, extra={"action": "config_unknown", "model": model}
            )
            return None
        return None if found == self._known.get(model) else found

    async def _entry(self, model: str) -> ModelConfig:
        body = await self._bucket.get(token(model))
        if body is None:
            return default_config(model)
        try:
            config = codec.decode(body, ModelConfig)
        except BadEncoding as error:
            log.warning(
                "rejected a model's configuration: %s", error, extra={"action": "entry_refused", "model": model}
            )
            return self.get(model)
        return config if config.model == model else default_config(model)
