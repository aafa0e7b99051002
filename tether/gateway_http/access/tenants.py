"""What the platform knows of each tenant: records from the ``tenants`` bucket, kept in memory by name."""

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
    """Follows the bucket. A tenant without a record is one with every default."""

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
        """Call ``listener`` with a tenant's name whenever its record came, changed or went."""
        self._listeners.append(listener)

    def _refused(self, key: str) -> None:
        """The record before it stays in force; without one nobody knows what the tenant may do."""
        name = name_of(key)
        if name not in self._known:
            self._doubtful.add(name)
            self._tell(name)

    def _changed(self, key: str, body: bytes | None) -> None:
        self._doubtful.discard(name_of(key))
        if body is None:
            self._removed.discard(name_of(key))
            self._forget(name_of(key))
            return
        try:
            record = codec.decode(body, Tenant)
        except BadEncoding as error:
            log.warning("unreadable tenant: %s", error, extra={"action": "entry_refused"})
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
        self._tell(record.name)

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._pools.pop(name, None)
        self._tell(name)

    def _tell(self, name: str) -> None:
        for listener in self._listeners:
            listener(name)

    def known(self) -> list[Tenant]:
        return sorted(self._known.values(), key=lambda record: record.name)

    def find(self, name: str) -> Tenant | None:
        return self._known.get(name)

    def get(self, name: str) -> Tenant:
        """The tenant's record, or the defaults when it has none."""
        return self._known.get(name) or Tenant(name)

    def removed(self, name: str) -> bool:
        """Whether there was a tenant of this name, which was removed."""
        return name in self._removed

    def require_unused(self, name: str) -> None:
        """Refuse the name of a tenant that was removed: who got it would have what that tenant left.

        Raises:
            Conflict
        """
        if self.removed(name):
            raise Conflict(
                f"tenant '{name}' was removed, and its models, grants and jobs may be there still; choose another name, or "
                f"bring it back with all that it left: 'tether tenant create {name} --restore'",
                field="tenant",
            )

    def doubtful(self, name: str) -> bool:
        """Whether the tenant has a record that cannot be believed: not even its defaults may be taken for granted."""
        return name in self._doubtful

    def weight(self, name: str) -> float:
        """Its share of a saturated platform, relative to the other tenants'."""
        return self.get(name).weight

    def pool(self, name: str) -> str:
        """Whose lanes the tenant's jobs go to: its own when it is isolated, else the shared ones."""
        return self._pools.get(name, SHARED)

    async def store(self, record: Tenant) -> None:
        """Keep a record; this gateway follows it at once, others within their watch's delay.

        Raises:
            BrokerUnavailable: it may be kept all the same.
        """
        key, body = token(record.name), codec.encode(record)
        await self.bucket.put(key, body)
        self._changed(key, body)

    async def create(self, record: Tenant) -> bool:
        """Keep the record of a new tenant; False when there is one of its name.

        Raises:
            BrokerUnavailable: it may be kept all the same.
        """
        key, body = token(record.name), codec.encode(record)
        made = await self.bucket.create(key, body)
        if made:
            self._changed(key, body)
        return made

    async def remove(self, name: str, now: float) -> None:
        """Put a note in place of a tenant's record that keeps its name from others; ``now`` is UTC seconds.

        Raises:
            BrokerUnavailable: it may be gone all the same.
        """
        await self.store(Tenant(name, removed_at=now))
