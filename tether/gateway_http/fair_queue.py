"""Fair queueing between tenants, and an estimate of how many jobs to run at once.

Pure: no I/O and no clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

JOB_BYTES = 512
"""Cost of a job beyond the bytes of its inputs: headers, hashing, a reply."""

_FORGET_AT = 256
"""Number of idle tenants above which those without outstanding cost are forgotten."""


class _Flow(Generic[T]):
    """One tenant's items, and the virtual time at which the first of them may start."""

    __slots__ = ("items", "number", "start", "weight")

    def __init__(self, number: int, start: float, weight: float) -> None:
        self.items: deque[tuple[T, int]] = deque()
        self.number = number
        self.start = start
        self.weight = weight

    def __lt__(self, other: _Flow[T]) -> bool:
        return (self.start, self.number) < (other.start, other.number)


class FairQueue(Generic[T]):
    """Start-time fair queueing (Goyal, Vin, Cheng 1996).

    Items of a tenant keep their order. While several tenants wait, the bytes taken of each are proportional
    to its weight; a tenant that was idle is next.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._flows: dict[str, _Flow[T]] = {}
        self._waiting: list[_Flow[T]] = []
        self._now = self._last = 0.0
        self._count = 0
        self._number = 0
        self.size = 0
        """Bytes of all queued items."""

    def __len__(self) -> int:
        return self._count

    def add(self, tenant: str, item: T, size: int) -> None:
        flow = self._flows.get(tenant)
        if flow is None:
            self._forget()
            self._number += 1
            flow = self._flows[tenant] = _Flow(self._number, self._now, 1.0)
        if not flow.items:
            flow.weight = max(self._weight(tenant), 1e-3)
            flow.start = max(flow.start, self._now)
            heapq.heappush(self._waiting, flow)
        flow.items.append((item, size))
        self._count += 1
        self.size += size

    def take(self, count: int, size: int, wanted: Callable[[T], bool]) -> list[T]:
        """Take at most ``count`` items of at most ``size`` bytes in total, but at least one; drop unwanted
        ones."""
        taken: list[T] = []
        used = 0
        waiting = self._waiting
        while waiting and len(taken) < count:
            flow = waiting[0]
            item, own = flow.items[0]
            keep = wanted(item)
            if keep and taken and used + own > size:
                break
            flow.items.popleft()
            self._count -= 1
            self.size -= own
            if keep:
                taken.append(item)
                used += own
                self._now = flow.start
                flow.start += (own + JOB_BYTES) / flow.weight
            if not flow.items:
                heapq.heappop(waiting)
                self._last = max(self._last, flow.start)
                if not waiting:
                    self._now = self._last
            elif len(waiting) > 1:
                heapq.heapreplace(waiting, flow)
        return taken

    def prune(self, wanted: Callable[[T], bool]) -> None:
        """Drop all unwanted items, wherever they are in the queue."""
        for flow in self._waiting:
            kept = deque(entry for entry in flow.items if wanted(entry[0]))
            self._count -= len(flow.items) - len(kept)
            self.size -= sum(size for _, size in flow.items) - sum(size for _, size in kept)
            flow.items = kept
            if not kept:
                self._last = max(self._last, flow.start)
        self._waiting = [flow for flow in self._waiting if flow.items]
        heapq.heapify(self._waiting)
        if not self._waiting:
            self._now = max(self._now, self._last)

    def _forget(self) -> None:
        """Forget idle tenants whose virtual time has passed: they would start where a new tenant starts."""
        if len(self._flows) >= len(self._waiting) + _FORGET_AT:
            self._flows = {name: flow for name, flow in self._flows.items() if flow.items or flow.start > self._now}


class RunTimeEstimator:
    """Estimates a lane's run time as ``fixed + each * jobs``, learned from answered bundles."""

    def __init__(self) -> None:
        self._jobs = self._span = self._squares = self._span_squares = self._products = 0.0
        self._last = 0
        self._learned = False

    _NEW = 0.05
    """Weight of the newest bundle."""

    _FOLLOWS = 0.25
    """Share of the variance of run times that the number of jobs must explain to count as their cause."""

    def learn(self, jobs: int, span_s: float) -> None:
        """Record that a bundle of ``jobs`` ran for ``span_s`` seconds on its worker."""
        self._last = jobs
        if not self._learned:
            self._learned = True
            self._jobs, self._span, self._products = jobs, span_s, jobs * span_s
            self._squares, self._span_squares = jobs * jobs, span_s * span_s
            return
        new = self._NEW
        self._jobs += new * (jobs - self._jobs)
        self._span += new * (span_s - self._span)
        self._squares += new * (jobs * jobs - self._squares)
        self._span_squares += new * (span_s * span_s - self._span_squares)
        self._products += new * (jobs * span_s - self._products)

    def most(self, limit: int, within_s: float) -> int:
        """Return how many jobs, at most ``limit``, run in about ``within_s``.

        Returns more if overhead would dominate each run. If the number of jobs does not explain the run times, a bundle
        may have twice as many jobs as the last one, and at least two: a busy machine makes every run long, so bundles
        would shrink to one job and never show that larger ones run no longer.
        """
        if not self._learned or self._span <= 0:
            return limit
        found = within_s * self._jobs / self._span
        variance = self._squares - self._jobs * self._jobs
        covariance = self._products - self._jobs * self._span
        if variance > 0.01 * self._squares:
            each = covariance / variance
            if each <= 0:
                return limit  # more jobs take no longer
            fixed = max(0.0, self._span - each * self._jobs)
            if each * limit <= within_s - fixed:
                return limit
            found = max(found, max(within_s - fixed, fixed) / each)
            spans = self._span_squares - self._span * self._span
            if covariance * covariance < self._FOLLOWS * variance * spans:
                found = max(found, 2 * self._last)
        elif self._jobs < 2:
            found = max(found, 2.0)
        return max(1, min(limit, int(found)))

    @property
    def span_s(self) -> float:
        """Moving average of the run time of a bundle, in seconds."""
        return self._span
