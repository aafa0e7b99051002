"""Reads the audit log: entries that match a filter, or the whole log for verification or export."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime

import msgspec

from tether.audit import AuditEntry, Block, Checker, Kind, Mark, Record, decode_block, entries_of
from tether.audit.spool import Leftover, read_run
from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import Historical, Keyset, MessageType, open_old_keyset
from tether.errors import EnvelopeError, KeysetError
from tether.process.data_dir import Home
from tether.wire.subjects import name_of

_WINDOW = 256
"""Messages per read when reading backwards."""

_MOST_WINDOWS = 40
_KINDS = frozenset(kind.value for kind in Kind) - {Kind.CHECKPOINT.value}


class Found(msgspec.Struct, frozen=True):
    """An entry with data of its block. ``position`` orders all entries: the stream's sequence and a number."""

    position: tuple[int, int]
    kind: Kind
    tenant: str
    writer: str
    entry: AuditEntry


class Filter(msgspec.Struct, frozen=True):
    """Search filter; empty fields match everything. Times are UTC milliseconds."""

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
    """Reads with the given keysets; skips entries that fail verification, which ``verify`` reports."""

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
        """Return the sequence of the newest block."""
        return await self._bus.direct_last(self._stream, self._bus.names.audit_subjects())

    async def forward(self, wanted: Filter, start: int) -> AsyncIterator[Found]:
        """Return existing entries from the block with sequence ``start`` on, oldest first."""
        async for item in self._bus.direct_scan(self._stream, self._subjects(wanted), start=start):
            for found in self._opened(item):
                if wanted.lets(found.entry):
                    yield found

    async def page(
        self, wanted: Filter, limit: int, before: tuple[int, int] | None = None
    ) -> tuple[list[Found], tuple[int, int] | None]:
        """Return at most ``limit`` entries before a position, newest first, and the position of the next page
        (None: no more).
        A page may have fewer entries if few match over a long stretch.
        """
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
        """Return the entries of a stretch, and the storage time of its last block: no entry in it is younger."""
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
        """Return every block in stream order."""
        async for item in self._bus.direct_scan(self._stream, self._bus.names.audit_subjects()):
            yield _record(item)


def _record(item: StoredMessage) -> Record:
    stored = item.headers.get("Nats-Time-Stamp", "")
    at = int(datetime.fromisoformat(stored).timestamp() * 1000) if stored else 0
    return Record(item.sequence, item.subject, at, item.headers.get("Nats-Msg-Id", ""), item.data)


async def reader(bus: Bus, home: Home) -> AuditReader:
    """Return a reader with every keyset known here.

    Raises:
        BrokerUnavailable, KeysetError
    """
    return AuditReader(bus, historical(await keysets(bus, home), home.root_public.read_bytes()))


async def keysets(bus: Bus, home: Home) -> list[bytes]:
    """Return every keyset of this machine and of the bucket ``keyset``, as signed by the root key."""
    found = [home.keyset.read_bytes()] if home.keyset.is_file() else []
    return list(dict.fromkeys([*found, *(await KvBucket(bus, "keyset").entries()).values()]))


def historical(signed: Iterable[bytes], root_public: bytes) -> Historical:
    """Return a verifier for those of ``signed`` that the root key signed, in force or not.

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
    """Return unsent blocks of this machine's writers, and their recorded chain heads."""
    return [read_run(path) for path in sorted(home.audit.glob("*/*/"))]


def check_local(checker: Checker, left: Iterable[Leftover]) -> list[Mark]:
    """Feed a check with blocks still on this machine; return the heads that it must find."""
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
