"""Key-value buckets without consumers: direct gets to read, a core subscription to learn of changes.

A bucket's stream stores messages published on ``$KV.<bucket>.<key>``; every subscriber of that subject
receives the same message. A watcher therefore subscribes, takes a snapshot by direct get, and fetches a key
again on a message: the stream may have refused that message. It takes a new snapshot after a reconnect, and
periodically.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from tether.bus.key_value.bucket_watch import OnChange, OnDeleted, Watcher
from tether.bus.key_value.verified_entries import VerifiedEntries
from tether.crypto import Envelope, MessageType
from tether.errors import (
    BadEncoding,
    EnvelopeError,
    PermissionDenied,
    StaleEntry,
    SubjectMismatch,
    Unavailable,
    VersionConflict,
)
from tether.wire import codec

if TYPE_CHECKING:
    from tether.bus.bus import Bus, StoredMessage

log = logging.getLogger(__name__)

T = TypeVar("T")

GONE = {"KV-Operation": "PURGE", "Nats-TTL": "1"}
"""Headers of an empty entry that replaces an obsolete one, and expires after a second."""

_TRIES = 16

ORDERED = frozenset(
    {"models", "aliases", "configs", "notes", "routes", "assign", "apikeys", "tenants", "tenantkeys", "modelkeys"}
)
"""Buckets whose entries never go back: a reader refuses an entry issued before one it has seen. Jobs, attempts and
heartbeats are too many to remember, and are checked against the results.
"""


class KvBucket:
    """One bucket. Values are the writer's signed bytes, unverified."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self.name = name
        self.stream = bus.names.bucket_stream(name)
        self._root = bus.names.bucket_key(name, "")

    def subject(self, key: str) -> str:
        return self._root + key

    async def get(self, key: str) -> bytes | None:
        found = await self._bus.direct_get(self.stream, self.subject(key))
        return None if found is None else _value(found)

    async def put(self, key: str, value: bytes, *, ttl_s: int | None = None) -> None:
        """Store a value; it expires after ``ttl_s`` whole seconds, if given."""
        headers = None if ttl_s is None else {"Nats-TTL": str(max(1, ttl_s))}
        await self._bus.publish_acked(self.subject(key), value, headers=headers)

    async def create(self, key: str, value: bytes, *, ttl_s: int | None = None) -> bool:
        """Store only if the key has no value; return False if it has."""
        headers = {} if ttl_s is None else {"Nats-TTL": str(max(1, ttl_s))}
        for _ in range(3):
            last = await self._bus.direct_get(self.stream, self.subject(key))
            if last is not None and _value(last) is not None:
                return False
            expected = "0" if last is None else str(last.sequence)
            try:
                await self._bus.publish_acked(
                    self.subject(key), value, headers={**headers, "Nats-Expected-Last-Subject-Sequence": expected}
                )
            except VersionConflict:
                continue
            return True
        return False

    async def delete(self, key: str, last: bytes = b"") -> None:
        """Delete the value. ``last`` is stored with the deletion marker, for readers of deleted entries."""
        await self._bus.publish_acked(self.subject(key), last, headers={"KV-Operation": "DEL"})

    async def forget(self, key: str, sequence: int) -> None:
        """Delete the key's entry at ``sequence``; after a second nothing of the key is left in the stream. A
        killed broker may bring it back: see :meth:`remove`, to which not every role has a right.

        Raises:
            VersionConflict: the key has another entry by now.
            BrokerUnavailable: it may be deleted all the same.
        """
        expected = {"Nats-Expected-Last-Subject-Sequence": str(sequence)}
        await self._bus.publish_acked(self.subject(key), b"", headers={**GONE, **expected})

    async def remove(self, key: str, sequence: int) -> None:
        """Delete the key's entry at ``sequence`` for good; later entries stay.

        A killed nats-server 2.15 brings back entries deleted by :meth:`forget` when it reads its files again:
        it recorded
        there that the empty entry is gone, but of the previous one only that it was replaced. This records it
        of the entry itself, and notifies no watcher. If an older broker configuration denies it, it acts as
        :meth:`forget`.

        Raises:
            BrokerUnavailable: it may be deleted all the same.
        """
        try:
            await self._bus.api(f"STREAM.PURGE.{self.stream}", {"filter": self.subject(key), "seq": sequence + 1})
        except PermissionDenied:
            with suppress(VersionConflict):
                await self.forget(key, sequence)

    async def was_deleted(self, key: str) -> bool:
        """Return whether the key had a value and was deleted; False if it never had one."""
        found = await self._bus.direct_get(self.stream, self.subject(key))
        return found is not None and found.headers.get("KV-Operation") is not None

    async def entries(self) -> dict[str, bytes]:
        """Return every key with a value."""
        return (await self.entries_and_deleted())[0]

    async def entries_and_deleted(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return every key with a value; and the ``last`` values of deleted ones, if :meth:`delete` got one."""
        found: dict[str, bytes] = {}
        deleted: dict[str, bytes] = {}
        async for item in self._bus.direct_scan(self.stream, self._root + ">"):
            value, key = _value(item), item.subject[len(self._root) :]
            if value is not None:
                found[key] = value
            elif item.data:
                deleted[key] = item.data
        return found, deleted

    @asynccontextmanager
    async def watch(
        self, on_change: OnChange, *, key: str = "", refetch: bool = True, on_deleted: OnDeleted | None = None
    ) -> AsyncIterator[None]:
        """Call ``on_change`` for every existing entry, then for every change, until the block ends.

        With ``key`` only for that one, which needs no right to read the others. ``refetch=False`` uses the
        published value without re-reading the stream (heartbeats only). ``on_deleted`` receives the ``last``
        values of deleted entries.
        """
        watcher = Watcher(self._bus, self, on_change, key=key, refetch=refetch, on_deleted=on_deleted)
        subscription = await self._bus.subscribe(self._root + (key or ">"), watcher.received)
        forget = self._bus.on_reconnect(watcher.resync.set)
        task = asyncio.create_task(watcher.run(), name=f"watch-{self.name}")
        try:
            await watcher.wait_first(task)
            yield
        finally:
            forget()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await subscription.unsubscribe()


class EntryRevision(msgspec.Struct, frozen=True):
    """The current entry of a key: its verified body (None: no valid one), sequence, and time of issue."""

    body: bytes | None = None
    sequence: int = 0
    issued_at: int = 0


class SignedBucket:
    """A bucket whose values are signed: signs on writing, verifies on reading.

    An entry with a wrong signature, subject or type is counted and treated as absent, and in :data:`ORDERED`
    buckets also one issued before another that this object has seen at its key. A writer therefore issues an
    entry later than the one it replaces, whatever its own clock says.
    """

    def __init__(self, bus: Bus, name: str, kind: MessageType) -> None:
        self._bus = bus
        self.kind = kind
        self._ordered = name in ORDERED
        self._issued: dict[str, int] = {}
        self.raw = KvBucket(bus, name)

    async def get(self, key: str) -> bytes | None:
        frame = await self.raw.get(key)
        return None if frame is None else self._open(key, frame)

    async def require(self, key: str) -> bytes | None:
        """Return :meth:`get`, but raise instead of treating an invalid entry as absent.

        Raises:
            Unavailable: there is an entry, and it cannot be verified.
        """
        frame = await self.raw.get(key)
        body = None if frame is None else self._open(key, frame)
        if frame is not None and body is None:
            raise Unavailable(f"an entry of bucket '{self.raw.name}' cannot be verified; see 'tether identity resign'")
        return body

    async def put(self, key: str, body: bytes, *, ttl_s: int | None = None) -> None:
        """Store, replacing any value.

        Raises:
            VersionConflict: in an ordered bucket, others wrote the key every time.
            BrokerUnavailable: it may be stored all the same.
        """
        if not self._ordered:
            await self.raw.put(key, self._seal(key, body), ttl_s=ttl_s)
            return
        for attempt in range(_TRIES):
            try:
                await self.replace(key, body, await self.latest(key), ttl_s=ttl_s)
                return
            except VersionConflict:
                if attempt == _TRIES - 1:
                    raise

    async def latest(self, key: str) -> EntryRevision:
        """Return the entry to pass to :meth:`replace`."""
        found = await self._bus.direct_get(self.raw.stream, self.raw.subject(key))
        if found is None:
            return EntryRevision()
        frame = _value(found)
        envelope = None if frame is None else self._envelope(key, frame)
        if envelope is None:
            return EntryRevision(None, found.sequence)
        return EntryRevision(envelope.body, found.sequence, envelope.header.issued_at)

    async def replace(self, key: str, body: bytes, latest: EntryRevision, *, ttl_s: int | None = None) -> None:
        """Store if the key still has ``latest``.

        Raises:
            VersionConflict: it has another entry by now.
            BrokerUnavailable: it may be stored all the same.
        """
        headers = {"Nats-Expected-Last-Subject-Sequence": str(latest.sequence)}
        if ttl_s is not None:
            headers["Nats-TTL"] = str(max(1, ttl_s))
        after = max(latest.issued_at, self._issued.get(key, 0))
        issued = max(self._bus.clock.utc_ms(), after + 1)
        frame = self._bus.signer.sign_envelope(self.kind, self.raw.subject(key), body, after=issued - 1)
        await self._bus.publish_acked(self.raw.subject(key), frame, headers=headers)
        if self._ordered:
            self._issued[key] = max(issued, self._issued.get(key, 0))

    async def create(self, key: str, body: bytes, *, ttl_s: int | None = None) -> bool:
        return await self.raw.create(key, self._seal(key, body), ttl_s=ttl_s)

    async def delete(self, key: str) -> None:
        await self.raw.delete(key)

    async def entries(self) -> dict[str, bytes]:
        opened = {key: self._open(key, frame) for key, frame in (await self.raw.entries()).items()}
        return {key: body for key, body in opened.items() if body is not None}

    @asynccontextmanager
    async def watch(
        self,
        on_change: OnChange,
        *,
        key: str = "",
        refetch: bool = True,
        on_refused: Callable[[str], None] | None = None,
        withdraw: bool = False,
        on_deleted: OnDeleted | None = None,
    ) -> AsyncIterator[None]:
        """Watch as :meth:`KvBucket.watch` with verified bodies; an entry that fails verification changes nothing.

        ``on_refused`` receives such entries; with ``withdraw`` an entry is removed when its signing key is
        revoked.
        ``on_deleted`` receives the ``last`` values of deleted entries, which it must verify itself.
        """
        verifier = self._bus.verifier
        believed = VerifiedEntries(verifier, self._open, on_change, on_refused=on_refused, withdraw=withdraw)
        forget = verifier.on_replace(believed.verify_again)
        try:
            async with self.raw.watch(believed.received, key=key, refetch=refetch, on_deleted=on_deleted):
                yield
        finally:
            forget()

    def _seal(self, key: str, body: bytes) -> bytes:
        return self._bus.signer.sign_envelope(self.kind, self.raw.subject(key), body, after=self._issued.get(key, 0))

    def _open(self, key: str, frame: bytes) -> bytes | None:
        envelope = self._envelope(key, frame)
        return None if envelope is None else envelope.body

    def _envelope(self, key: str, frame: bytes) -> Envelope | None:
        """Return the verified entry of a key; None (logged and counted) if it is refused."""
        try:
            try:
                envelope = self._bus.verifier.verify_envelope(
                    frame, subject=self.raw.subject(key), types=(self.kind,), stored=True
                )
            except SubjectMismatch as error:
                raise StaleEntry(f"an entry of bucket '{self.raw.name}' was signed for another key") from error
            self._check_order(key, envelope.header.issued_at)
        except EnvelopeError as error:
            self._bus.count_refused(error, self.raw.subject(key))
            return None
        return envelope

    def _check_order(self, key: str, issued_at: int) -> None:
        if not self._ordered:
            return
        newest = self._issued.get(key, 0)
        if issued_at < newest:
            behind = newest - issued_at
            raise StaleEntry(
                f"bucket '{self.raw.name}': an entry was replaced {behind} ms after it was issued, and is back"
            )
        self._issued[key] = issued_at


def read_entry(body: bytes, kind: type[T]) -> T | None:
    """Decode a verified entry; None (logged) if it cannot be decoded."""
    try:
        return codec.decode(body, kind)
    except BadEncoding as error:
        log.warning("ignored an unreadable entry: %s", error, extra={"action": "entry_refused"})
        return None


def _value(item: StoredMessage) -> bytes | None:
    gone = item.headers.get("KV-Operation") or item.headers.get("Nats-Marker-Reason")
    return None if gone else item.data
