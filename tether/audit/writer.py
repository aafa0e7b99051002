"""Writes a service's audit log: recorded events become signed blocks, first on its own disk, then in the stream.

Recording appends in memory and never waits. Several times a second a task makes blocks of the recorded events
(see :mod:`tether.audit`), stores them in the spool and wakes another task, which sends them to the stream
with retries. A block outlives the process once it is in the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from tether import audit
from tether.audit import NOBODY, Chain, Kind, Mark, Record, What, clean, encode
from tether.audit import reader as audit_read
from tether.audit.budget import BULK, Budget
from tether.audit.reader import AuditReader
from tether.audit.repeated_attempts import OTHERS, Attempt, Attempts
from tether.audit.sender import Sender
from tether.audit.spool import Leftover, Spool, SpoolState, forget, leftovers
from tether.bus.bus import Bus
from tether.crypto import MessageType
from tether.errors import ConfigError, EnvelopeError
from tether.process import metrics
from tether.process.data_dir import Home
from tether.process.lifecycle import Tasks
from tether.wire import codec

log = logging.getLogger(__name__)

FLUSH_S = 0.2
GATHER_S = 1.0
"""Identical attempts within this time are one entry with a count."""

CHECKPOINT_S = 10.0
MOST_PENDING = 65_536
"""Maximum entries in memory without a block: six seconds at ten thousand requests a second."""

_SECURITY = frozenset(Kind) - BULK

Pending = tuple[Kind, str, tuple[Any, ...]]
"""Kind, tenant, and the fields of an entry."""


class AuditLog:
    """One audit writer; use :func:`writing`. Not thread-safe: it belongs to the event loop of its service."""

    def __init__(self, bus: Bus, home: Home) -> None:
        self._bus = bus
        self._home = home
        mode = bus.settings.audit
        self._kinds = {"off": frozenset[Kind](), "security": _SECURITY, "full": frozenset(Kind)}[mode]
        self._all = mode == "full"
        self.run = os.urandom(6).hex()
        self._pending: list[Pending] = []
        self._attempts = Attempts()
        self.budget = Budget(bus)
        self._chains: dict[str, Chain] = {}
        self._at: dict[str, int] = {}
        self._lost = 0
        self._gathered = self._listed = 0.0
        self._unwritten: list[Record] = []
        self._flushing = asyncio.Lock()
        self._ending = asyncio.Event()
        self._spool: Spool | None = None
        self._sender: Sender | None = None

    # called by services

    def inference(self, tenant: str, *fields: Any) -> None:
        """Record one synchronous request: the fields of :class:`tether.audit.AuditEntry` in order, without the time."""
        if not self._all:
            return
        if self.budget.allows(Kind.INFERENCE, tenant, len(self._pending) / MOST_PENDING):
            self._pending.append((Kind.INFERENCE, tenant, (time.time_ns() // 1_000_000, *fields)))
        else:
            self.count(Kind.INFERENCE, tenant, actor=fields[0], action=OTHERS, outcome=fields[2], by=tenant)

    def record(
        self,
        kind: Kind,
        tenant: str,
        *,
        actor: str,
        action: str,
        outcome: str = "ok",
        model: str = "",
        version: int = 0,
        job: str = "",
        request_id: str = "",
        bytes_in: int = 0,
        address: str = "",
        detail: str = "",
    ) -> None:
        """Record one action as one entry. Texts may be a client's: they are shortened, and secrets of keys
        are removed.
        """
        if kind not in self._kinds:
            return
        if not self.budget.allows(kind, tenant, len(self._pending) / MOST_PENDING):
            self.count(kind, tenant, actor=actor, action=OTHERS, outcome=outcome, by=tenant)
            return
        if len(self._pending) >= MOST_PENDING:
            self._lose(1)
            return
        at = self._bus.clock.utc_ms()
        told = (actor, clean(action), outcome, clean(model), version, job, clean(request_id))
        self._pending.append((kind, tenant, (at, *told, bytes_in, 0, 0, 1, address, clean(detail))))

    def count(
        self,
        kind: Kind,
        tenant: str,
        *,
        actor: str = NOBODY,
        action: str,
        outcome: str,
        model: str = "",
        address: str = "",
        detail: str = "",
        request_id: str = "",
        by: str = "",
    ) -> None:
        """Record an event that a client can repeat at will; identical events within a second are merged.
        ``by``: owner for the
        limit, if it is not ``actor``, a name that the caller chose.
        """
        if kind not in self._kinds:
            return
        attempt = Attempt(kind, tenant, actor, clean(action), outcome, clean(model), address, clean(detail))
        self._attempts.add(attempt, self._bus.clock.utc_ms(), clean(request_id), by or actor)

    def refused_envelope(self, code: str, subject: str) -> None:
        """Record a refused message; of its subject only the parts that do not identify a single call."""
        shown = ".".join(subject.split(".")[:3])
        self.count(Kind.ENVELOPE, "", actor=NOBODY, action="refuse", outcome=code, detail=shown)

    def believed_keyset(self, version: int, changes: str) -> None:
        """Record a newly trusted keyset."""
        told = f"version {version}: {changes}"
        self.record(Kind.IDENTITY, "", actor=self._bus.signer.name, action="keyset", detail=told)

    async def settled(self) -> None:
        """Wait until everything recorded so far is in the spool, or cannot be written there."""
        await self._flush(everything=True)

    async def reader(self) -> AuditReader:
        """Return a reader of the whole log.

        Raises:
            BrokerUnavailable
        """
        return await audit_read.reader(self._bus, self._home)

    def _lose(self, count: int) -> None:
        if not self._lost:
            log.error("audit log full: entries lost", extra={"action": "audit_lost"})
        self._lost += count
        metrics.AUDIT_LOST.inc(count)

    # from memory to the spool

    async def run_flush(self) -> None:
        """Write blocks until :meth:`end`; a write is never interrupted, or it might be repeated."""
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._ending.wait()
            try:
                await self._flush()
            except Exception:
                log.exception("audit log not written", extra={"action": "audit_failed"})

    async def _flush(self, *, everything: bool = False, last: bool = False) -> None:
        if self._spool is None:
            return
        async with self._flushing:
            if not self._unwritten and self._spool.size < self._bus.settings.audit_spool_mb << 20:
                self._gather(everything=everything)
                await self._make_blocks()
                self._make_checkpoint(everything=last)
            if self._unwritten:
                await self._write(self._spool)

    def _gather(self, *, everything: bool) -> None:
        now = self._bus.clock.monotonic()
        if not self._attempts or (now - self._gathered < GATHER_S and not everything):
            return
        self._gathered = now
        for one, seen in self._attempts.take().items():
            lasted = (seen.last - seen.first) * 1000
            told = (one.actor, one.action, one.outcome, one.model, 0, "", seen.request, 0, 0)
            fields = (seen.first, *told, lasted, seen.count, one.address, one.detail)
            self._pending.append((one.kind, one.tenant, fields))

    async def _make_blocks(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), audit.BLOCK_ENTRIES):
            try:
                self._make_some(pending[start : start + audit.BLOCK_ENTRIES])
            except Exception:
                # a revoked signer cannot sign
                self._lose(len(pending) - start)
                raise
            await asyncio.sleep(0)

    def _make_some(self, pending: Sequence[Pending]) -> None:
        by_subject: dict[tuple[str, Kind], list[bytes]] = {}
        for kind, tenant, row in pending:
            by_subject.setdefault((tenant, kind), []).append(encode(row))
        for (tenant, kind), rows in by_subject.items():
            self._block(kind, tenant, rows)

    def _block(self, kind: Kind, tenant: str, rows: Sequence[bytes]) -> None:
        subject = self._bus.names.audit(tenant, kind)
        chain = self._chains.get(subject)
        if chain is None:
            chain = self._chains[subject] = Chain(self.run, subject)
        body = chain.block(rows)
        name = audit.message_id(self.run, chain.number, subject)
        frame = self._bus.signer.sign_envelope(MessageType.AUDIT, subject, body, message_id=name, tenant=tenant)
        self._at[subject] = self._bus.clock.utc_ms()
        self._unwritten.append(Record(0, subject, 0, name, frame))
        metrics.AUDIT_ENTRIES.labels(kind.value).inc(len(rows))

    def _make_checkpoint(self, *, everything: bool) -> None:
        """Write a checkpoint of the blocks since the last one: soon if there are some, occasionally if not."""
        now = self._bus.clock.monotonic()
        marks = self._heads()
        quiet = audit.ALIVE_MS / 1000 - FLUSH_S
        cut = self._sender is not None and bool(self._sender.cuts)
        if not everything and not cut and now - self._listed < (CHECKPOINT_S if marks or self._lost else quiet):
            return
        self._listed = now
        at = self._bus.clock.utc_ms()
        if self._lost:
            marks.append(Mark(at, What.LOST, self.run, number=self._lost))
            self._lost = 0
        marks += self._cuts(at)
        for mark in marks:
            if mark.what is What.HEAD:
                self._chains[mark.subject].listed = mark.number
        if everything:
            marks.append(Mark(at, What.END, self.run))
        self._mark(marks or [Mark(at, What.ALIVE, self.run)])

    def _cuts(self, at: int) -> list[Mark]:
        """Return the stream's losses of earlier runs. A broker that syncs before it acknowledges loses
        nothing in a power cut, so with ``durability`` ``durable`` no explanation of a loss is recorded.
        """
        cuts = [] if self._sender is None else self._sender.cuts
        found = [Mark(at, What.CUT, state.run, number=state.sequence) for state in cuts if not self._synced]
        cuts.clear()
        return found

    @property
    def _synced(self) -> bool:
        return self._bus.settings.durability == "durable"

    def _heads(self) -> list[Mark]:
        own = self._bus.names.audit("", Kind.CHECKPOINT)
        return [
            Mark(self._at[name], What.HEAD, self.run, name, chain.listed + 1, chain.number, chain.head)
            for name, chain in self._chains.items()
            if chain.listed < chain.number and name != own
        ]

    def _mark(self, marks: Sequence[Mark]) -> None:
        for start in range(0, len(marks), audit.BLOCK_ENTRIES):
            rows = [codec.pack(msgspec.structs.astuple(mark)) for mark in marks[start : start + audit.BLOCK_ENTRIES]]
            self._block(Kind.CHECKPOINT, "", rows)

    async def _write(self, spool: Spool) -> None:
        try:
            await asyncio.to_thread(spool.append, self._unwritten, self._state())
        except OSError as error:
            log.error("audit spool not written: %s", error.strerror, extra={"action": "audit_spool_failed"})  # noqa: TRY400 - the reason is in it
            return
        self._unwritten.clear()
        metrics.AUDIT_SPOOL_BYTES.set(spool.size)
        if self._sender is not None:
            self._sender.wake.set()

    def _state(self) -> SpoolState:
        heads = [(name, chain.number, chain.head, self._at[name]) for name, chain in self._chains.items()]
        if self._sender is None:
            return SpoolState(self.run, 0, tuple(heads))
        return SpoolState(self.run, self._sender.sequence, tuple(heads), self._sender.last)

    # from one run to the next

    async def begin(self) -> Sender:
        """Take over and record what earlier runs left; from now on there is a spool."""
        folder = self._home.audit / self._bus.signer.name
        with _usable(folder), leftovers(folder) as found:
            self._spool = await asyncio.to_thread(Spool, folder, self.run, sync=self._synced)
            known = [item.state for item in found if item.state is not None]
            left = [record for item in found for record in item.records]
            before = [state.sequence for state in known] if left else None
            names = [record.message_id for record in left]
            self._sender = Sender(self._bus, self._spool, before, known, names)
            self._unwritten += left
            await self._write(self._spool)
            self._begin_marks(known)
            await self._write(self._spool)
            if not self._unwritten:
                await asyncio.to_thread(forget, found)
        self._note_leftovers(found)
        return self._sender

    def _begin_marks(self, known: Sequence[SpoolState]) -> None:
        self._listed = self._bus.clock.monotonic()
        begin = Mark(self._bus.clock.utc_ms(), What.BEGIN, self.run)
        self._mark([begin, *(mark for state in known for mark in state.marks())])

    def _note_leftovers(self, found: Sequence[Leftover]) -> None:
        count = sum(len(item.records) for item in found)
        if count:
            log.info("sending %d audit blocks of an earlier run", count, extra={"action": "audit_resumed"})

    async def end(self, within_s: float) -> None:
        """Write pending entries and the end of the run; unsent blocks stay for the next run."""
        self._ending.set()
        try:
            await self._flush(everything=True, last=True)
        except EnvelopeError as error:
            log.warning("end of the audit log not written: %s", error, extra={"action": "audit_failed"})
        if self._sender is not None and self._bus.connected:
            await self._sender.drained(within_s)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the audit spool {folder} cannot be written: {error.strerror}; give it to this user"
        ) from error


@asynccontextmanager
async def writing(bus: Bus, home: Home, tasks: Tasks) -> AsyncIterator[AuditLog]:
    """Run the audit log of this process until the block ends; with the setting ``audit`` off it discards everything."""
    written = AuditLog(bus, home)
    if bus.settings.audit == "off":
        yield written
        return
    sender = await written.begin()
    flushing = tasks.spawn(written.run_flush(), "audit-flush")
    sending = tasks.spawn(sender.run(), "audit-send")
    looking = tasks.spawn(written.budget.keep(), "audit-room")
    bus.on_refused = written.refused_envelope
    bus.on_keyset = written.believed_keyset
    try:
        yield written
    finally:
        bus.on_refused = bus.on_keyset = None
        try:
            await written.end(2.0)
            await asyncio.gather(flushing, return_exceptions=True)
        finally:
            sending.cancel()
            looking.cancel()
            await asyncio.gather(sending, looking, return_exceptions=True)
            written.close()
