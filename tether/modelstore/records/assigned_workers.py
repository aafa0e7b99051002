"""Which workers are told to hold a model, as the dispatcher's assignments say: they may open it when it is encrypted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket, read_entry
from tether.crypto import MessageType
from tether.domain.worker_protocol import Assignment
from tether.errors import PermissionDenied

log = logging.getLogger(__name__)


class Assigned:
    """Follows the bucket ``assign``."""

    def __init__(self, bus: Bus) -> None:
        self._bucket = SignedBucket(bus, "assign", MessageType.ASSIGN)
        self._models: dict[str, frozenset[str]] = {}
        self._unknown = False
        self.news = asyncio.Event()
        """Set when a worker is told to hold other models; whoever waits for it clears it."""

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Know them until the block ends. Where the broker's configuration is older and does not let this identity read them,
        every worker counts as told to hold every model."""
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._bucket.watch(self._changed))
            except PermissionDenied as error:
                self._unknown = True
                log.error(  # noqa: TRY400 - it says it all
                    "every worker may open every encrypted model: %s; write the broker's configuration again",
                    error,
                    extra={"action": "assignments_unread"},
                )
            yield

    def _changed(self, worker: str, body: bytes | None) -> None:
        assignment = None if body is None else read_entry(body, Assignment)
        models = frozenset(() if assignment is None else [ref.model for ref in assignment.models])
        if models != self._models.get(worker, frozenset()):
            self._models[worker] = models
            self.news.set()

    def to(self, model: str) -> frozenset[str] | None:
        """Names of the workers that are told to hold a version of the model; None: nobody knows which."""
        if self._unknown:
            return None
        return frozenset(worker for worker, models in self._models.items() if model in models)
