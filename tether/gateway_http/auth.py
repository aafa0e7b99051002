"""Who is calling: API keys from the ``apikeys`` bucket, kept in memory by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from tether import codec
from tether.apikey import ApiKey
from tether.bus.connection import Bus
from tether.bus.kv import SignedBucket
from tether.envelope import MessageType
from tether.errors import Forbidden, Unauthenticated


class ApiKeys:
    """Looks keys up by the SHA-256 of their text, so a wrong one costs what a right one costs."""

    def __init__(self, bus: Bus) -> None:
        self.bucket = SignedBucket(bus, "apikeys", MessageType.API_KEY)
        self._by_hash: dict[str, ApiKey] = {}
        self._by_id: dict[str, ApiKey] = {}

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with self.bucket.watch(self._changed):
            yield

    def _changed(self, key: str, body: bytes | None) -> None:
        old = self._by_id.pop(key, None)
        if old is not None:
            self._by_hash.pop(old.hash, None)
        if body is not None:
            record = codec.decode(body, ApiKey)
            self._by_id[record.id] = record
            if not record.revoked:
                self._by_hash[record.hash] = record

    def known(self) -> list[ApiKey]:
        return sorted(self._by_id.values(), key=lambda record: record.created_at)

    def find(self, key_id: str) -> ApiKey | None:
        return self._by_id.get(key_id)

    async def store(self, record: ApiKey) -> None:
        """Keep a key; this gateway accepts it at once, others within their watch's delay.

        Raises:
            BrokerUnavailable: it may be kept all the same.
        """
        body = codec.encode(record)
        await self.bucket.put(record.id, body)
        self._changed(record.id, body)

    async def revoke(self, record: ApiKey) -> ApiKey:
        """The key as it is kept from now on: known, and refused.

        Raises:
            BrokerUnavailable: it may be revoked all the same.
        """
        revoked = msgspec.structs.replace(record, revoked=True)
        await self.store(revoked)
        return revoked

    def authenticate(self, text: str, scope: str) -> ApiKey:
        """The key that a request presented, when it may do what ``scope`` names.

        Raises:
            Unauthenticated: no key, or not a valid one; both say the same.
            Forbidden: the key lacks the scope.
        """
        record = self._by_hash.get(hashlib.sha256(text.encode()).hexdigest())
        if record is None:
            raise Unauthenticated("Invalid API key")
        if not record.allows(scope):
            raise Forbidden(f"this API key lacks the scope '{scope}'", field="scope")
        return record
