"""What the platform knows of each tenant: records from the ``tenants`` bucket, kept in memory by name."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tether import codec
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.envelope import MessageType
from tether.errors import BadEncoding
from tether.job import SHARED
from tether.subjects import name_of, token
from tether.tenant import Tenant

log = logging.getLogger(__name__)


class Tenants:
    """Follows the bucket. A tenant without a record is one with every default."""

    def __init__(self, bus: Bus) -> None:
        self.bucket = SignedBucket(bus, "tenants", MessageType.TENANT)
        self._known: dict[str, Tenant] = {}
        self._scopes: dict[str, str] = {}
        self._doubtful: set[str] = set()
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
            name = name_of(key)
            self._known.pop(name, None)
            self._scopes.pop(name, None)
            self._tell(name)
            return
        try:
            record = codec.decode(body, Tenant)
        except BadEncoding as error:
            log.warning("unreadable tenant: %s", error, extra={"action": "entry_refused"})
            return
        if token(record.name) != key:
            return
        self._known[record.name] = record
        self._scopes[record.name] = record.scope
        self._tell(record.name)

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

    def doubtful(self, name: str) -> bool:
        """Whether the tenant has a record that cannot be believed: not even its defaults may be taken for granted."""
        return name in self._doubtful

    def weight(self, name: str) -> float:
        """Its share of a saturated platform, relative to the other tenants'."""
        return self.get(name).weight

    def scope(self, name: str) -> str:
        """Whose lanes the tenant's jobs go to: its own when it is isolated, else the shared ones."""
        return self._scopes.get(name, SHARED)

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

    async def remove(self, name: str) -> None:
        """Forget a tenant's record.

        Raises:
            BrokerUnavailable: it may be gone all the same.
        """
        await self.bucket.delete(token(name))
        self._changed(token(name), None)
