"""How much of a store of model chunks one tenant may fill: a multiple of what is free in it, as in a queue of jobs.

It holds beside the quota ``stored_bytes``, and for tenants without one. Where no other tenant has a key or a record, the store is
all of the one's that there is.
"""

from __future__ import annotations

from collections.abc import Callable

from tether.bus.bus import Bus
from tether.domain.tenant import Tenant
from tether.errors import QuotaExceeded
from tether.storage.stored_bytes import Stored
from tether.streams.usage import StreamUses, tenant_limit


class ChunkShares:
    """The shares as one gateway sees them. ``shared``: whether there is another tenant than this one."""

    def __init__(self, bus: Bus, stored: Stored, shared: Callable[[str], bool]) -> None:
        self._names = bus.names
        self._uses = StreamUses(bus)
        self._stored = stored
        self._shared = shared

    async def require(self, tenant: Tenant, bucket: str, loose: int, more: int) -> None:
        """Prove that a tenant's share of a store has room for ``more`` bytes beside those of its versions and ``loose`` ones of chunks
        that no version names. Nothing is counted while nobody can be over a share.

        Raises:
            QuotaExceeded: there is none.
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
        f"tenant '{tenant.name}' has {has} bytes of model chunks in a store that has room for {limit} of one tenant just now; "
        "delete versions, or raise max_file_mb or the tenant's weight",
        field="max_file_mb",
        retry_after=60.0,
    )
