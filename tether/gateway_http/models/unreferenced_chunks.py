"""Chunks that a tenant with a quota stored and that no version names yet: they take room like those of its versions.

Without this, chunks that are never registered, files that are refused and uploads that break off would fill the store past
the quota ``stored_bytes``. A gateway counts what came through it since it started.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable

from tether.domain.chunking import Bytes
from tether.domain.tenant import Tenant, check_stored_bytes
from tether.errors import QuotaExceeded

KEPT_S = 86_400.0
"""A chunk that nothing names is counted for a day."""

MOST = 65_536
"""Chunks of one tenant that are counted: 64 GiB of them where they have their mean size."""

_Chunk = tuple[str, str]
"""The bucket and the digest."""


class UnreferencedChunks:
    """``now`` is monotonic seconds; ``stored_bytes`` says what a tenant's versions have."""

    def __init__(self, now: Callable[[], float], stored_bytes: Callable[[str], int]) -> None:
        self._now = now
        self._stored_bytes = stored_bytes
        self._chunks: dict[str, dict[_Chunk, tuple[float, int]]] = {}
        """By tenant, oldest first: until when each counts, and its bytes."""
        self._bytes: dict[str, int] = {}

    def bytes_of(self, tenant: str) -> int:
        """What a tenant's chunks that nothing names have."""
        self._expire(tenant)
        return self._bytes.get(tenant, 0)

    def take(self, tenant: Tenant, bucket: str, digest: str, size: int) -> bool:
        """Count a chunk that is about to be stored; False when it is counted already, or nothing bounds the tenant.

        Raises:
            QuotaExceeded: the tenant has no room for it.
        """
        if not tenant.quotas.stored_bytes:
            return False
        loose = self.bytes_of(tenant.name)
        chunks = self._chunks.setdefault(tenant.name, {})
        if (bucket, digest) in chunks:
            return False
        check_stored_bytes(tenant, self._stored_bytes(tenant.name) + loose, size)
        if len(chunks) >= MOST:
            raise QuotaExceeded(
                f"tenant '{tenant.name}' has {MOST} chunks that no version names; register them first",
                field="stored_bytes",
                retry_after=60,
            )
        chunks[bucket, digest] = (self._now() + KEPT_S, size)
        self._bytes[tenant.name] = loose + size
        return True

    def drop(self, tenant: str, bucket: str, digests: Iterable[str]) -> None:
        """Count these no more: a version names them, or they were there before."""
        chunks = self._chunks.get(tenant, {})
        for digest in digests:
            if (found := chunks.pop((bucket, digest), None)) is not None:
                self._bytes[tenant] -= found[1]

    async def counted(
        self, tenant: Tenant, bucket: str, named: frozenset[str], chunks: AsyncIterator[tuple[str, Bytes]]
    ) -> AsyncIterator[tuple[str, Bytes]]:
        """The chunks of an upload, each counted before it is handed on, except those that a version has ``named``.

        Raises:
            QuotaExceeded: the tenant has no room for the next one.
        """
        async for digest, chunk in chunks:
            if digest not in named:
                self.take(tenant, bucket, digest, len(chunk))
            yield digest, chunk

    def _expire(self, tenant: str) -> None:
        chunks, now = self._chunks.get(tenant, {}), self._now()
        while chunks and next(iter(chunks.values()))[0] <= now:
            self._bytes[tenant] -= chunks.pop(next(iter(chunks)))[1]
