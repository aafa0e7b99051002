"""A request's way past the response cache: an answer that is kept, one that is just being computed, or a run of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from tether.errors import DeadlineExceeded
from tether.gateway_http.inference.response_cache import Answer, CacheLookup, ResponseCache
from tether.process import metrics

HIT, MISS = ("x-tether-cache", "hit"), ("x-tether-cache", "miss")
"""Headers of the answer."""

Send = Callable[[float], "asyncio.Future[Answer]"]
"""Puts the request on its way to a worker; it gets the seconds that are left."""

Allowed = Callable[[], bool]
"""Whether the answer may be kept, asked when it is there: tenant and model may have changed meanwhile."""


class _Run:
    """A request that was sent, and how many callers wait for its answer."""

    __slots__ = ("callers", "future", "withdraw")

    def __init__(self, future: asyncio.Future[Answer], withdraw: Callable[[], None]) -> None:
        self.future = future
        self.callers = 1
        self.withdraw = withdraw

    def leave(self) -> None:
        """One caller waits no more; without the last of them nobody needs the answer."""
        self.callers -= 1
        if not self.callers and not self.future.done():
            self.withdraw()


class RequestCoalescer:
    """Looks up and keeps answers; of requests that are the same and open at the same time, one is run.

    ``most_following`` requests at most wait for another one's answer; those beyond are run.
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
        """The outputs, and whether they were computed for another request. ``withdraw`` takes back what ``send`` put on its
        way, once all who wait for its answer have left.

        One that waits for another's answer is not harmed by how that ends: it is run itself then.

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
            # those who follow must not lose the answer when this caller leaves
            return await asyncio.shield(run.future), False
        finally:
            run.leave()

    async def _followed(self, first: _Run, timeout_s: float) -> Answer | None:
        """The answer to the request that is open; None when it gets none, or too many wait already."""
        if self.following >= self._most_following:
            return None
        self.following += 1
        first.callers += 1
        future = first.future
        try:
            await asyncio.wait((future,), timeout=timeout_s)
            if not future.done():
                raise DeadlineExceeded("no answer before the request's deadline")
        finally:
            self.following -= 1
            first.leave()
        return None if future.cancelled() or future.exception() is not None else future.result()

    def _ended(self, question: CacheLookup, allowed: Allowed, future: asyncio.Future[Answer]) -> None:
        del self._open[question.digest]
        if not future.cancelled() and future.exception() is None and allowed():
            self.cache.put(question, future.result())
