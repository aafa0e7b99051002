"""Workers assigned to each model by the dispatcher: they may decrypt it if it is encrypted."""

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
    """Watches the bucket ``assign``."""

    def __init__(self, bus: Bus) -> None:
        self._bucket = SignedBucket(bus, "assign", MessageType.ASSIGN)
        self._models: dict[str, frozenset[str]] = {}
        self._unknown = False
        self.news = asyncio.Event()
        """Set when an assignment changes; the waiter clears it."""

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Watch assignments until the block ends. If an older broker configuration denies this identity
        reading them, every worker counts as assigned to every model.
        """
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._bucket.watch(self._changed))
            except PermissionDenied as error:
                self._unknown = True
                log.error(  # noqa: TRY400 - it says it all
                    "every worker may decrypt every encrypted model: %s; rewrite the broker's configuration",
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
        """Return names of the workers assigned to a version of the model; None if unknown."""
        if self._unknown:
            return None
        return frozenset(worker for worker, models in self._models.items() if model in models)
