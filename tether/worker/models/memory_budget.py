"""Memory budget for models in a worker, counted as the dispatcher does: file size times instances.

A load reserves memory. If there is too little, idle versions are evicted, least recently used first. They
stay assigned, and their next job loads them again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tether.domain.manifest import ModelRef
from tether.errors import Unavailable
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.worker.models.instances import InstancePool

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""Seconds that a load waits for others to become idle."""
_MB = 1 << 20

Evictable = Callable[[], Iterable[tuple[ModelRef, InstancePool]]]
"""Versions that may be evicted now: loaded, not pinned, not in use."""


@dataclass
class _MemoryWaiter:
    ref: ModelRef
    size: int
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Memory:
    """Reserves memory for versions within ``budget`` bytes; 0 is unlimited."""

    def __init__(self, budget: int, evictable: Evictable) -> None:
        self._budget = budget
        self._evictable = evictable
        self._taken: dict[ModelRef, int] = {}
        self._waiting: list[_MemoryWaiter] = []
        self._closing = Tasks()

    def taken(self, ref: ModelRef) -> int:
        """Return the bytes reserved for a version."""
        return self._taken.get(ref, 0)

    async def reserve(self, ref: ModelRef, size: int) -> None:
        """Reserve ``size`` bytes for a version instead of its last reservation; wait if necessary."""
        if self._budget and size > self._budget:
            raise Unavailable(
                f"not enough memory: need {_mib(size)} MiB, worker_memory_mb is {_mib(self._budget)}; raise it"
            )
        if self._waiting or not self._make_room(ref, size):
            await self._wait(_MemoryWaiter(ref, size))
        await self._closing.finish(WAIT_S)

    def take(self, ref: ModelRef, size: int) -> bool:
        """Reserve memory if no load waits and nothing must be unloaded. Return True on success."""
        if self._waiting or self._closing or self._victims(ref, size) != []:
            return False
        return self._make_room(ref, size)

    async def _wait(self, waiting: _MemoryWaiter) -> None:
        self._waiting.append(waiting)
        self.wake_waiters()
        try:
            async with asyncio.timeout(WAIT_S):
                await waiting.done
        except TimeoutError as error:
            raise Unavailable(
                f"not enough memory: need {_mib(waiting.size)} MiB, all loaded models are pinned or in use; raise worker_memory_mb"
            ) from error
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self.wake_waiters()

    def change(self, ref: ModelRef, size: int) -> None:
        """Set the reservation of a version; 0: it is not in memory."""
        if size:
            self._taken[ref] = size
        else:
            self._taken.pop(ref, None)
        metrics.MODEL_MEMORY.set(sum(self._taken.values()))
        self.wake_waiters()

    def wake_waiters(self) -> None:
        """Grant memory to waiting loads in order of arrival, after a version became idle or unloaded."""
        while self._waiting and self._make_room(self._waiting[0].ref, self._waiting[0].size):
            waiting = self._waiting.pop(0)
            if not waiting.done.done():
                waiting.done.set_result(None)

    def evict(self, ref: ModelRef, copies: InstancePool, reason: str) -> None:
        """Unload an idle version."""
        self._evict(ref, copies, reason)
        metrics.MODEL_MEMORY.set(sum(self._taken.values()))
        self.wake_waiters()

    async def close(self) -> None:
        await self._closing.finish(WAIT_S)
        await self._closing.cancel()

    def _make_room(self, ref: ModelRef, size: int) -> bool:
        """Reserve memory, evicting idle versions if that suffices. Return True on success."""
        victims = self._victims(ref, size)
        if victims is None:
            return False
        for other, copies in victims:
            self._evict(other, copies, "memory")
        self._taken[ref] = size
        metrics.MODEL_MEMORY.set(sum(self._taken.values()))
        return True

    def _victims(self, ref: ModelRef, size: int) -> list[tuple[ModelRef, InstancePool]] | None:
        over = sum(self._taken.values()) - self.taken(ref) + size - self._budget if self._budget else 0
        found: list[tuple[ModelRef, InstancePool]] = []
        for other, copies in sorted(self._evictable(), key=lambda one: one[1].used_at) if over > 0 else ():
            if over > 0 and other != ref:
                found.append((other, copies))
                over -= self.taken(other)
        return None if over > 0 else found

    def _evict(self, ref: ModelRef, copies: InstancePool, reason: str) -> None:
        self._taken.pop(ref, None)
        generation = copies.detach()
        if generation is not None:
            self._closing.spawn(asyncio.to_thread(generation.close), f"evict-{ref.model}")
        metrics.MODEL_UNLOADS.labels(reason).inc()
        log.info("unloaded: %s", reason, extra={"action": "model_evicted", "model": ref.model, "version": ref.version})


def _mib(size: int) -> int:
    return -(-size // _MB)
