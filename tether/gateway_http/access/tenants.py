"""In-memory mirror of the ``tenants`` bucket, by tenant name."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.domain.job import SHARED
from tether.domain.tenant import Tenant
from tether.errors import BadEncoding, Conflict
from tether.wire import codec
from tether.wire.subjects import name_of, token

log = logging.getLogger(__name__)


class Tenants:
    """Mirrors the bucket. A tenant without a record has the defaults."""

    def __init__(self, bus: Bus) -> None:
        self.bucket = SignedBucket(bus, "tenants", MessageType.TENANT)
        self._known: dict[str, Tenant] = {}
        self._pools: dict[str, str] = {}
        self._doubtful: set[str] = set()
        self._removed: set[str] = set()
        self._listeners: list[Callable[[str], None]] = []

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with self.bucket.watch(self._changed, on_refused=self._refused):
            yield

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` with a tenant's name whenever its record is added, changed or removed."""
        self._listeners.append(listener)

    def _refused(self, key: str) -> None:
        """Keep the previous record of a refused entry; without one, mark the tenant's rights as unknown."""
        name = name_of(key)
        if name not in self._known:
            self._doubtful.add(name)
            self._notify(name)

    def _changed(self, key: str, body: bytes | None) -> None:
        self._doubtful.discard(name_of(key))
        if body is None:
            self._removed.discard(name_of(key))
            self._forget(name_of(key))
            return
        try:
            record = codec.decode(body, Tenant)
        except BadEncoding as error:
            log.warning("ignored an unreadable tenant record: %s", error, extra={"action": "entry_refused"})
            return
        if token(record.name) != key:
            return
        if record.removed_at:
            self._removed.add(record.name)
            self._forget(record.name)
            return
        self._removed.discard(record.name)
        self._known[record.name] = record
        self._pools[record.name] = record.pool
        self._notify(record.name)

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._pools.pop(name, None)
        self._notify(name)

    def _notify(self, name: str) -> None:
        for listener in self._listeners:
            listener(name)

    def known(self) -> list[Tenant]:
        return sorted(self._known.values(), key=lambda record: record.name)

    def find(self, name: str) -> Tenant | None:
        return self._known.get(name)

    def get(self, name: str) -> Tenant:
        """Return the tenant's record, or the defaults if it has none."""
        return self._known.get(name) or Tenant(name)

    def removed(self, name: str) -> bool:
        """Return True if a tenant of this name was removed."""
        return name in self._removed

    def require_unused(self, name: str) -> None:
        """Reject the name of a removed tenant: a new tenant would inherit its data.

        Raises:
            Conflict
        """
        if self.removed(name):
            raise Conflict(
                f"tenant '{name}' was removed, and its models, grants and jobs may still exist; "
                f"choose another name, or restore it with all of them: 'tether tenant create {name} --restore'",
                field="tenant",
            )

    def doubtful(self, name: str) -> bool:
        """Return True if the tenant's record cannot be verified: then not even the defaults apply."""
        return name in self._doubtful

    def weight(self, name: str) -> float:
        """Return its share of a saturated platform, relative to other tenants."""
        return self.get(name).weight

    def pool(self, name: str) -> str:
        """Return the pool of the tenant's lanes: its own if it is isolated, else the shared one."""
        return self._pools.get(name, SHARED)

    async def store(self, record: Tenant) -> None:
        """Store a record. This gateway applies it at once, others within their watch's delay.

        Raises:
            BrokerUnavailable: it may have been stored all the same.
        """
        key, body = token(record.name), codec.encode(record)
        await self.bucket.put(key, body)
        self._changed(key, body)

    async def create(self, record: Tenant) -> bool:
        """Store the record of a new tenant; return False if the name is taken.

        Raises:
            BrokerUnavailable: it may have been stored all the same.
        """
        key, body = token(record.name), codec.encode(record)
        made = await self.bucket.create(key, body)
        if made:
            self._changed(key, body)
        return made

    async def remove(self, name: str, now: float) -> None:
        """Replace a tenant's record by a tombstone that reserves its name; ``now`` is UTC seconds.

        Raises:
            BrokerUnavailable: it may have been removed all the same.
        """
        await self.store(Tenant(name, removed_at=now))
