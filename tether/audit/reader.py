"""Reading the audit log back: entries that fit a filter, and the whole of it for a check or a file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime

import msgspec

from tether.audit import AuditEntry, Block, Checker, Kind, Mark, Record, decode_block, entries_of
from tether.audit.spool import Leftover, look
from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import Historical, Keyset, MessageType, open_old_keyset
from tether.errors import EnvelopeError, KeysetError
from tether.process.data_dir import Home
from tether.wire.subjects import name_of

_WINDOW = 256
"""Messages looked at together on the way back."""

_MOST_WINDOWS = 40
_KINDS = frozenset(kind.value for kind in Kind) - {Kind.CHECKPOINT.value}


class Found(msgspec.Struct, frozen=True):
    """An entry with what its block says of it. ``position`` orders all entries: the stream's sequence and a number."""

    position: tuple[int, int]
    kind: Kind
    tenant: str
    writer: str
    entry: AuditEntry


class Filter(msgspec.Struct, frozen=True):
    """What to look for; empty fields let everything through. Times are UTC milliseconds."""

    tenant: str = ""
    kind: Kind | None = None
    since: int = 0
    until: int = 0
    model: str = ""
    key: str = ""
    job: str = ""
    outcome: str = ""

    def lets(self, entry: AuditEntry) -> bool:
        return (
            (not self.since or entry.at >= self.since)
            and (not self.until or entry.at < self.until)
            and self.model in ("", entry.model)
            and (not self.key or entry.actor == f"key:{self.key}")
            and self.job in ("", entry.job)
            and self.outcome in ("", entry.outcome)
        )


class AuditReader:
    """Reads with the keysets given; what does not verify is passed over here and named by the check."""

    def __init__(self, bus: Bus, historical: Historical) -> None:
        self._bus = bus
        self._historical = historical
        self._stream = bus.names.audit_stream

    def _subjects(self, wanted: Filter) -> str:
        kind = "*" if wanted.kind is None else wanted.kind.value
        return self._bus.names.audit(wanted.tenant, kind) if wanted.tenant else f"{self._root}.*.{kind}"

    @property
    def _root(self) -> str:
        return self._bus.names.audit_subjects().removesuffix(".>")

    async def last(self) -> int:
        """The sequence of the newest block."""
        return await self._bus.direct_last(self._stream, self._bus.names.audit_subjects())

    async def forward(self, wanted: Filter, start: int) -> AsyncIterator[Found]:
        """Entries from the block with sequence ``start`` on, oldest first, as far as there are any now."""
        async for item in self._bus.direct_scan(self._stream, self._subjects(wanted), start=start):
            for found in self._opened(item):
                if wanted.lets(found.entry):
                    yield found

    async def page(
        self, wanted: Filter, limit: int, before: tuple[int, int] | None = None
    ) -> tuple[list[Found], tuple[int, int] | None]:
        """At most ``limit`` entries, newest first, that lie before a position, and the position that the next page
        lies before; None: that was all. A page may hold fewer when nothing fits for a long way back."""
        upper = before if before is not None else (await self.last() + 1, 0)
        found: list[Found] = []
        for _ in range(_MOST_WINDOWS):
            lower = max(1, upper[0] - _WINDOW)
            rows, stored_at = await self._window(wanted, lower, upper)
            for item in reversed(rows):
                if item.position >= upper or not wanted.lets(item.entry):
                    continue
                found.append(item)
                if len(found) == limit:
                    return found, item.position
            if lower == 1 or 0 < stored_at < wanted.since:
                return found, None
            upper = (lower, 0)
        return found, upper

    async def _window(self, wanted: Filter, lower: int, upper: tuple[int, int]) -> tuple[list[Found], int]:
        """The entries of a stretch, and when its last block was stored: none of them is younger."""
        rows: list[Found] = []
        stored_at = 0
        async for item in self._bus.direct_scan(self._stream, self._subjects(wanted), start=lower, batch=_WINDOW):
            if (item.sequence, 0) > upper:
                break
            rows += self._opened(item)
            stored_at = _record(item).stored_at
        return rows, stored_at

    def _opened(self, item: StoredMessage) -> Iterator[Found]:
        tenant, kind = item.subject.split(".")[-2:]
        if kind not in _KINDS:
            return
        try:
            envelope = self._historical.open(item.data, subject=item.subject, types=(MessageType.AUDIT,))
            entries = entries_of(decode_block(envelope.body), AuditEntry)
        except EnvelopeError:
            return
        shown = "" if tenant == "-" else name_of(tenant)
        for number, entry in enumerate(entries, 1):
            yield Found((item.sequence, number), Kind(kind), shown, envelope.sender, entry)

    async def records(self) -> AsyncIterator[Record]:
        """Every block, in the order of the stream."""
        async for item in self._bus.direct_scan(self._stream, self._bus.names.audit_subjects()):
            yield _record(item)


def _record(item: StoredMessage) -> Record:
    stored = item.headers.get("Nats-Time-Stamp", "")
    at = int(datetime.fromisoformat(stored).timestamp() * 1000) if stored else 0
    return Record(item.sequence, item.subject, at, item.headers.get("Nats-Msg-Id", ""), item.data)


async def reader(bus: Bus, home: Home) -> AuditReader:
    """A reader with every keyset that is known here.

    Raises:
        BrokerUnavailable, KeysetError
    """
    return AuditReader(bus, historical(await keysets(bus, home), home.root_public.read_bytes()))


async def keysets(bus: Bus, home: Home) -> list[bytes]:
    """Every keyset this machine and the bucket ``keyset`` know, as the root key signed them."""
    found = [home.keyset.read_bytes()] if home.keyset.is_file() else []
    return list(dict.fromkeys([*found, *(await KvBucket(bus, "keyset").entries()).values()]))


def historical(signed: Iterable[bytes], root_public: bytes) -> Historical:
    """Verification against those of ``signed`` that the root key signed, in force or not.

    Raises:
        KeysetError: there is none.
    """
    opened: list[Keyset] = []
    for data in signed:
        try:
            opened.append(open_old_keyset(data, root_public))
        except KeysetError:
            continue
    if not opened:
        raise KeysetError("there is no keyset that the pinned root key signed; give the file 'keyset' of the platform")
    return Historical(opened)


def left_behind(home: Home) -> list[Leftover]:
    """What the writers of this machine have not sent yet, and how far they know their chains to have come."""
    return [look(path) for path in sorted(home.audit.glob("*/*/"))]


def check_local(checker: Checker, left: Iterable[Leftover]) -> list[Mark]:
    """Let a check know of blocks that are still on this machine; the heads that it must then find."""
    known: list[Mark] = []
    for item in left:
        for record in item.records:
            checker.add(record)
        if item.state is not None:
            known += item.state.marks()
    return known


__all__ = [
    "AuditReader",
    "Block",
    "Filter",
    "Found",
    "check_local",
    "historical",
    "keysets",
    "left_behind",
    "reader",
]
