"""In-memory cache of outputs for repeated requests, for as long as the model's configuration allows.

Entries are keyed by a digest of everything that the outputs depend on. Each tenant has its own entries; when
the cache is full, a tenant above its share loses its least recently used ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from tether.domain.job import Job
from tether.domain.tensor import Tensor
from tether.process import metrics

Answer = tuple[Tensor, ...]

ENTRY_BYTES = 768
TENSOR_BYTES = 320
"""Overhead of an entry, and of each of its outputs, beyond the bytes of the outputs."""

_LARGEST = 8
"""An entry may take at most this fraction (1/8) of the cache."""

_STALE = 4
"""Entries checked for expiry with each new one."""


def digest_of(job: Job, pool: str, model: str, version: int, generation: int) -> bytes:
    """Return the cache key of a request, which covers every byte of its inputs.

    ``generation`` separates periods in which outputs may differ.
    """
    shapes = [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in job.inputs]
    asked = (pool, job.tenant, model, version, generation, job.outputs, shapes)
    # SHA-256 has CPU instructions: twice as fast as BLAKE2 on large inputs
    digest = hashlib.sha256(repr(asked).encode())
    for tensor in job.inputs:
        digest.update(tensor.data)
    return digest.digest()


class CacheLookup(NamedTuple):
    """A request by its cache key; see :func:`digest_of`."""

    tenant: str
    model: str
    digest: bytes
    timeout_s: float
    ttl_s: float


class _Entry(NamedTuple):
    model: str
    outputs: Answer
    size: int
    until: float


class _TenantLru(OrderedDict[bytes, _Entry]):
    """The entries of one tenant, least recently used first."""

    size = 0


class ResponseCache:
    """At most ``limit`` bytes of outputs. ``now`` is a monotonic clock, in seconds."""

    def __init__(self, limit: int, now: Callable[[], float]) -> None:
        self.limit = limit
        self._now = now
        self._shelves: dict[str, _TenantLru] = {}
        self.size = 0

    def __len__(self) -> int:
        return sum(len(shelf) for shelf in self._shelves.values())

    def get(self, tenant: str, digest: bytes) -> Answer | None:
        """Return the cached outputs, or None if there are none or they have expired."""
        shelf = self._shelves.get(tenant)
        entry = None if shelf is None else shelf.get(digest)
        if shelf is None or entry is None:
            return None
        if entry.until <= self._now():
            self._remove(tenant, shelf, digest)
            return None
        shelf.move_to_end(digest)
        return entry.outputs

    def put(self, question: CacheLookup, outputs: Answer) -> None:
        """Cache outputs for ``ttl_s`` seconds, unless they would take too much of the cache."""
        size = ENTRY_BYTES + sum([TENSOR_BYTES + len(tensor.data) for tensor in outputs])
        if size * _LARGEST > self.limit:
            return
        tenant, digest = question.tenant, question.digest
        shelf = self._shelves.get(tenant)
        if shelf is None:
            shelf = self._shelves[tenant] = _TenantLru()
        elif digest in shelf:
            self._take(shelf, digest)
        now = self._now()
        shelf[digest] = _Entry(question.model, outputs, size, now + question.ttl_s)
        shelf.size += size
        self.size += size
        self._drop_stale(shelf, now)
        while self.size > self.limit:
            self._evict(shelf)

    def drop_model(self, model: str) -> None:
        """Remove every entry of a model."""
        for tenant, shelf in list(self._shelves.items()):
            for digest in [digest for digest, entry in shelf.items() if entry.model == model]:
                self._remove(tenant, shelf, digest)

    def drop_tenant(self, tenant: str) -> None:
        """Remove every entry of a tenant."""
        shelf = self._shelves.pop(tenant, None)
        if shelf is not None:
            self.size -= shelf.size

    def _drop_stale(self, shelf: _TenantLru, now: float) -> None:
        for _ in range(min(_STALE, len(shelf) - 1)):
            digest = next(iter(shelf))
            if shelf[digest].until > now:
                return
            self._take(shelf, digest)

    def _evict(self, own: _TenantLru) -> None:
        """Evict from the tenant that adds an entry if it has its share already, else from the largest one."""
        most = own
        if own.size * len(self._shelves) < self.size:
            most = max(self._shelves.values(), key=lambda shelf: shelf.size)
        self._take(most, next(iter(most)))
        metrics.CACHE_EVICTIONS.inc()
        if not most:
            self._shelves = {tenant: shelf for tenant, shelf in self._shelves.items() if shelf}

    def _take(self, shelf: _TenantLru, digest: bytes) -> None:
        size = shelf.pop(digest).size
        shelf.size -= size
        self.size -= size

    def _remove(self, tenant: str, shelf: _TenantLru, digest: bytes) -> None:
        self._take(shelf, digest)
        if not shelf:
            del self._shelves[tenant]
