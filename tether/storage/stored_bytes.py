"""Index of the bucket ``models``: the bytes of each tenant's versions, for its quota ``stored_bytes``.

A gateway feeds it from its watch (:class:`Stored`). A model store reads changes on each query
(:class:`StoredVersions`), so that its answer includes the newest versions.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.domain.manifest import Manifest
from tether.errors import EnvelopeError
from tether.model.stored_bytes import chunks_of, stored_bytes
from tether.storage.model_files import open_manifest

CHUNK_OVERHEAD = 600
"""Approximate bytes per chunk beside its content: description, subjects and headers of two messages."""


class _Own:
    """One tenant's versions by key, and its deleted versions that are not yet collected."""

    def __init__(self) -> None:
        self.kept: dict[str, Manifest] = {}
        self.deleted: dict[str, Manifest] = {}
        self.bytes: int | None = 0
        self.room: Counter[int] | None = None
        """None: must be recomputed."""


class Stored:
    """Index fed with every version; :meth:`of` costs time in proportion to the tenant's own versions."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._tenants: dict[str, _Own] = {}
        self._owners: dict[str, str] = {}

    def of(self, tenant: str) -> int:
        """Return bytes of a tenant's versions, and of its deleted ones until they are collected."""
        own = self._tenants.get(tenant)
        if own is None:
            return 0
        if own.bytes is None:
            own.bytes = stored_bytes(own.kept.values(), own.deleted.values())
        return own.bytes

    def room(self, tenant: str, partition: int) -> int:
        """Return the approximate bytes of a tenant's chunks in a partition's store, each counted once."""
        own = self._tenants.get(tenant)
        if own is None:
            return 0
        if own.room is None:
            every = [*own.kept.values(), *own.deleted.values()]
            chunks = {chunk: size for one in every for chunk, size in chunks_of(one).items()}
            own.room = Counter()
            for (place, _), size in chunks.items():
                own.room[place] += size + CHUNK_OVERHEAD
        return own.room[partition]

    def keep(self, key: str, manifest: Manifest) -> None:
        """Add a version."""
        self._changed(key, manifest.tenant).kept[key] = manifest

    def drop(self, key: str) -> None:
        """Remove a version."""
        if key in self._owners:
            own = self._changed(key, self._owners[key])
            own.kept.pop(key, None)
            if key not in own.deleted:
                del self._owners[key]

    def deleted(self, key: str, frame: bytes) -> None:
        """Record a deleted version; nothing if it was collected."""
        try:
            manifest = open_manifest(self._bus.verifier, self._bus.names, key, frame) if frame else None
        except EnvelopeError:
            return
        if manifest is not None:
            self._changed(key, manifest.tenant).deleted[key] = manifest
        elif key in self._owners:
            self._changed(key, self._owners.pop(key)).deleted.pop(key, None)

    def _changed(self, key: str, tenant: str) -> _Own:
        self._owners[key] = tenant
        own = self._tenants.setdefault(tenant, _Own())
        own.bytes = own.room = None
        return own


class StoredVersions:
    """Index that reads every manifest once, and again when it changes; a query costs what was pushed since
    the last one.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = KvBucket(bus, "models")
        self._stored = Stored(bus)
        self._seen = 0
        """Sequence of the last entry read."""
        self._turn = asyncio.Lock()
        bus.on_reconnect(self._begin_anew)

    def _begin_anew(self) -> None:
        self._seen = 0

    async def of(self, tenant: str) -> int:
        """See :meth:`Stored.of`.

        Raises:
            BrokerUnavailable: no answer.
        """
        async with self._turn:
            await self._read()
        return self._stored.of(tenant)

    async def _read(self) -> None:
        prefix = len(self._bucket.subject(""))
        async for item in self._bus.direct_scan(self._bucket.stream, self._bucket.subject(">"), start=self._seen + 1):
            key = item.subject[prefix:]
            if item.headers.get("KV-Operation"):
                self._stored.drop(key)
                self._stored.deleted(key, item.data)
            else:
                self._keep(key, item.data)
            self._seen = item.sequence

    def _keep(self, key: str, frame: bytes) -> None:
        try:
            self._stored.keep(key, open_manifest(self._bus.verifier, self._bus.names, key, frame))
        except EnvelopeError:
            return
