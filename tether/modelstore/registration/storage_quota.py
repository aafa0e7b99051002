"""Enforces the quota ``stored_bytes`` where versions are made, after any check of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.domain.manifest import Manifest
from tether.domain.tenant import Tenant, check_stored_bytes
from tether.errors import BadEncoding, Unavailable
from tether.storage.stored_bytes import StoredVersions
from tether.wire import codec
from tether.wire.subjects import token


class StorageQuota:
    """Serialises the versions of one tenant, so that two cannot use the same free bytes."""

    def __init__(self, bus: Bus) -> None:
        self._tenants = SignedBucket(bus, "tenants", MessageType.TENANT)
        self.stored = StoredVersions(bus)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Hold the tenant's lock for making a version."""
        async with self._locks.setdefault(tenant, asyncio.Lock()):
            yield

    async def check(self, manifest: Manifest) -> None:
        """Refuse a version that exceeds its tenant's quota.

        Raises:
            QuotaExceeded
            Unavailable: the tenant's record cannot be read.
            BrokerUnavailable: no answer.
        """
        tenant = await self._tenant(manifest.tenant) if manifest.tenant else None
        if tenant is not None and tenant.quotas.stored_bytes:
            check_stored_bytes(tenant, await self.stored.of(tenant.name), manifest.size)

    async def _tenant(self, name: str) -> Tenant | None:
        body = await self._tenants.require(token(name))
        try:
            return None if body is None else codec.decode(body, Tenant)
        except BadEncoding as error:
            raise Unavailable(f"cannot read the record of tenant '{name}'") from error
