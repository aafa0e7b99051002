"""Answers a request from the response cache, from an identical request in flight, or by a run of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from tether.errors import DeadlineExceeded
from tether.gateway_http.inference.response_cache import Answer, CacheLookup, ResponseCache
from tether.process import metrics

HIT, MISS = ("x-tether-cache", "hit"), ("x-tether-cache", "miss")
"""Response headers."""

Send = Callable[[float], "asyncio.Future[Answer]"]
"""Submits the request to a worker, with the remaining seconds as timeout."""

Allowed = Callable[[], bool]
"""Return True if the outputs may be cached. Called when they arrive: tenant and model may have changed
meanwhile."""


class _Run:
    """A submitted request and the number of callers that wait for it."""

    __slots__ = ("callers", "future", "withdraw")

    def __init__(self, future: asyncio.Future[Answer], withdraw: Callable[[], None]) -> None:
        self.future = future
        self.callers = 1
        self.withdraw = withdraw

    def leave(self) -> None:
        """Remove one caller; withdraw the request with the last one."""
        self.callers -= 1
        if not self.callers and not self.future.done():
            self.withdraw()


class RequestCoalescer:
    """Caches outputs, and runs only one of several identical requests that are in flight at the same time.

    At most ``most_following`` requests wait for another one's reply; any more are run.
    """

    def __init__(self, cache: ResponseCache, now: Callable[[], float], most_following: int) -> None:
        self.cache = cache
        self._now = now
        self._most_following = most_following
        self._open: dict[bytes, _Run] = {}
        self.following = 0

    async def answer(
        self, question: CacheLookup, send: Send, withdraw: Callable[[], None], allowed: Allowed
    ) -> tuple[Answer, bool]:
        """Return the outputs, and whether they were computed for another request.

        ``withdraw`` cancels what ``send`` submitted, once all callers that wait for it have left. A request
        that follows another one is run itself if that one fails.

        Raises:
            TetherError: as ``send`` and its future, and when ``timeout_s`` is over.
        """
        began, digest = self._now(), question.digest
        found = self.cache.get(question.tenant, digest)
        if found is None and (first := self._open.get(digest)) is not None:
            found = await self._followed(first, question.timeout_s)
        if found is not None:
            metrics.CACHE_HITS.labels(question.model).inc()
            return found, True
        metrics.CACHE_MISSES.labels(question.model).inc()
        run = _Run(send(question.timeout_s - (self._now() - began)), withdraw)
        if digest not in self._open:
            self._open[digest] = run
            run.future.add_done_callback(partial(self._ended, question, allowed))
        try:
            # followers must not lose the outputs when this caller leaves
            return await asyncio.shield(run.future), False
        finally:
            run.leave()

    async def _followed(self, first: _Run, timeout_s: float) -> Answer | None:
        """Return the outputs of the request in flight; None if it fails or already has too many followers."""
        if self.following >= self._most_following:
            return None
        self.following += 1
        first.callers += 1
        future = first.future
        try:
            await asyncio.wait((future,), timeout=timeout_s)
            if not future.done():
                raise DeadlineExceeded("no reply before the request's deadline")
        finally:
            self.following -= 1
            first.leave()
        return None if future.cancelled() or future.exception() is not None else future.result()

    def _ended(self, question: CacheLookup, allowed: Allowed, future: asyncio.Future[Answer]) -> None:
        del self._open[question.digest]
        if not future.cancelled() and future.exception() is None and allowed():
            self.cache.put(question, future.result())
