"""Limits each tenant's share of a chunk store to a multiple of its free space, as for job queues.

Applies beside the quota ``stored_bytes``, and to tenants without one. A tenant may fill the store if no other
tenant has a key or a record.
"""

from __future__ import annotations

from collections.abc import Callable

from tether.bus.bus import Bus
from tether.domain.tenant import Tenant
from tether.errors import QuotaExceeded
from tether.storage.stored_bytes import Stored
from tether.streams.usage import StreamUses, tenant_limit


class ChunkShares:
    """The shares as one gateway sees them. ``shared`` returns True if there is any other tenant."""

    def __init__(self, bus: Bus, stored: Stored, shared: Callable[[str], bool]) -> None:
        self._names = bus.names
        self._uses = StreamUses(bus)
        self._stored = stored
        self._shared = shared

    async def require(self, tenant: Tenant, bucket: str, loose: int, more: int) -> None:
        """Check that a tenant's share of a store has room for ``more`` bytes.

        Its usage is that of its versions plus ``loose`` bytes of unreferenced chunks; it is counted only
        while the store is full enough for some tenant to exceed its share.

        Raises:
            QuotaExceeded: there is no room.
        """
        stream = self._names.object_stream(bucket)
        use = await self._uses.of(stream)
        limit = None if use is None else tenant_limit(use, tenant.weight)
        if limit is not None and self._shared(tenant.name):
            has = self._stored.room(tenant.name, self._names.chunk_buckets().index(bucket)) + loose
            if has + more > limit:
                raise _exceeded(tenant, has, limit)
        self._uses.took(stream, more)


def _exceeded(tenant: Tenant, has: int, limit: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant '{tenant.name}' has {has} bytes of model chunks in a store, "
        f"which now has room for {limit} bytes of one tenant; "
        "delete versions, or raise max_file_mb or the tenant's weight",
        field="max_file_mb",
        retry_after=60.0,
    )
