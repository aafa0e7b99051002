"""Counts stored chunks that no version references yet towards their tenant's quota.

Otherwise unregistered chunks, rejected files and aborted uploads could exceed the quota ``stored_bytes`` and
the tenant's share. A gateway counts the chunks that it stored since it started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from tether.domain.chunking import Bytes
from tether.domain.tenant import Tenant, check_stored_bytes
from tether.errors import QuotaExceeded
from tether.storage.stored_bytes import CHUNK_OVERHEAD

KEPT_S = 86_400.0
"""Seconds for which an unreferenced chunk is counted: a day."""

MOST = 65_536
"""Counted chunks of one tenant: 64 GiB at their average size."""

Share = Callable[[Tenant, str, int, int], Awaitable[None]]

_Chunk = tuple[str, str]
"""Bucket and digest."""


class UnreferencedChunks:
    """Unreferenced chunks by tenant. ``now`` is monotonic seconds; ``stored_bytes`` returns the bytes of a
    tenant's versions; ``share`` checks a tenant's share of a bucket, given its unreferenced bytes there."""

    def __init__(self, now: Callable[[], float], stored_bytes: Callable[[str], int], share: Share) -> None:
        self._share = share
        self._now = now
        self._stored_bytes = stored_bytes
        self._chunks: dict[str, dict[_Chunk, tuple[float, int]]] = {}
        """By tenant, oldest first: expiry and size of each chunk."""
        self._bytes: dict[str, int] = {}
        self._room: Counter[tuple[str, str]] = Counter()
        """Their bytes by tenant and bucket."""

    def bytes_of(self, tenant: str) -> int:
        """Return the bytes of a tenant's unreferenced chunks."""
        self._expire(tenant)
        return self._bytes.get(tenant, 0)

    async def take(self, tenant: Tenant, bucket: str, digest: str, size: int) -> bool:
        """Count a chunk before it is stored; return False if it is counted already.

        Raises:
            QuotaExceeded: the tenant has no room for it.
        """
        loose = self.bytes_of(tenant.name)
        chunks = self._chunks.setdefault(tenant.name, {})
        if (bucket, digest) in chunks:
            return False
        check_stored_bytes(tenant, self._stored_bytes(tenant.name) + loose, size)
        if len(chunks) >= MOST:
            if tenant.quotas.stored_bytes:
                raise QuotaExceeded(
                    f"tenant '{tenant.name}' has {MOST} unreferenced chunks; register versions of them first",
                    field="stored_bytes",
                    retry_after=60,
                )
            self.drop(tenant.name, *_one(next(iter(chunks))))
        await self._share(tenant, bucket, self._room[tenant.name, bucket], size + CHUNK_OVERHEAD)
        self.drop(tenant.name, bucket, [digest])  # it may have been uploaded twice meanwhile
        chunks[bucket, digest] = (self._now() + KEPT_S, size)
        self._bytes[tenant.name] = self._bytes.get(tenant.name, 0) + size
        self._room[tenant.name, bucket] += size + CHUNK_OVERHEAD
        return True

    def drop(self, tenant: str, bucket: str, digests: Iterable[str]) -> None:
        """Stop counting chunks that a version references or that existed before."""
        chunks = self._chunks.get(tenant, {})
        for digest in digests:
            if (found := chunks.pop((bucket, digest), None)) is not None:
                self._bytes[tenant] -= found[1]
                self._room[tenant, bucket] -= found[1] + CHUNK_OVERHEAD

    async def counted(
        self, tenant: Tenant, bucket: str, named: frozenset[str], chunks: AsyncIterator[tuple[str, Bytes]]
    ) -> AsyncIterator[tuple[str, Bytes]]:
        """Yield the chunks of an upload; count each one first, except those ``named`` by a version.

        Raises:
            QuotaExceeded: the tenant has no room for the next one.
        """
        async for digest, chunk in chunks:
            if digest not in named:
                await self.take(tenant, bucket, digest, len(chunk))
            yield digest, chunk

    def _expire(self, tenant: str) -> None:
        chunks, now = self._chunks.get(tenant, {}), self._now()
        while chunks and next(iter(chunks.values()))[0] <= now:
            self.drop(tenant, *_one(next(iter(chunks))))


def _one(chunk: _Chunk) -> tuple[str, list[str]]:
    return chunk[0], [chunk[1]]
