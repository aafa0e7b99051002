"""Sends audit blocks from the spool to the stream: each once, each chain in order, with retries without end.

A broker that loses power may lose what it acknowledged last. A sender remembers its last blocks for some seconds and stores
them again when the broker is back without them; and a run that begins looks whether what an earlier run was told to be
stored last is still there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from tether.audit import Record, message_id
from tether.audit.spool import Spool, SpoolState
from tether.bus.bus import Bus
from tether.errors import BrokerUnavailable, QueueFull, StorageFull, TetherError
from tether.process import metrics

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 64
"""Blocks in flight at once, each of another chain."""

_AGAIN_S = 0.5
_REFUSED_S = 5.0
_KEEP_S = 5.0
"""Seconds to remember a stored block: with ``sync_interval`` 1 s a power cut loses no older one."""

_LAST_MS = 2_000
_FAR_BACK = 4096
"""Messages to search back for the last blocks of an earlier run: those of its last two seconds."""

_BACK = 256
"""Concurrent blocks may be stored in another order; the search back starts so much earlier."""


class Sender:
    """``before``: sequences up to which earlier runs know the stream to be complete; None without earlier runs.
    ``earlier`` are the states of those runs, ``left`` the message ids of their blocks in the spool.
    """

    def __init__(
        self,
        bus: Bus,
        spool: Spool,
        before: Sequence[int] | None,
        earlier: Sequence[SpoolState] = (),
        left: Collection[str] = (),
    ) -> None:
        self._bus = bus
        self._spool = spool
        self.wake = asyncio.Event()
        self._empty = asyncio.Event()
        self.sequence = min(before, default=0) if before else 0
        """The stream has every block made before this message."""
        self.last = ""
        """Message id of this run's block at ``sequence``."""
        self.cuts: list[SpoolState] = []
        """Earlier runs whose last blocks are lost; the reader empties the list."""
        self._earlier = list(earlier)
        self._left = frozenset(left)
        self._kept: deque[tuple[float, int, Record]] = deque()
        """Recently stored blocks: time of storing in monotonic seconds, and sequence."""
        self._based = before is not None
        self._doubt = before is not None
        self._refused = ""

    async def run(self) -> None:
        """Send until cancelled."""
        forget = self._bus.on_reconnect(self._reconnected)
        try:
            while True:
                self.wake.clear()
                pause = await self._tried()
                try:
                    async with asyncio.timeout(pause):
                        await self.wake.wait()
                except TimeoutError:
                    continue
        finally:
            forget()

    def _reconnected(self) -> None:
        self._doubt = True
        self.wake.set()

    async def _tried(self) -> float | None:
        """Send pending blocks; return the delay before a retry, None: until new blocks arrive."""
        try:
            await self._send_all()
        except BrokerUnavailable as error:
            log.debug("audit blocks not sent yet: %s", error, extra={"action": "audit_waits"})
            self._doubt = True
            return _AGAIN_S
        except TetherError as error:
            self._doubt = True
            self._complain(error)
            return _REFUSED_S
        except Exception:
            log.exception("audit blocks could not be sent", extra={"action": "audit_failed"})
            self._doubt = True
            return _REFUSED_S
        return None

    def _complain(self, error: TetherError) -> None:
        metrics.AUDIT_FULL.set(1 if isinstance(error, QueueFull | StorageFull) else 0)
        if self._refused != error.code:
            log.error(
                "the stream refused audit blocks: %s",
                error,
                extra={"action": "audit_refused", "code": error.code},
            )
        self._refused = error.code

    async def _send_all(self) -> None:
        if self._earlier:
            await self._find_cuts()
        if self._doubt:
            await self._look_back()
        while not self._spool.empty:
            self._empty.clear()
            if not self._based:
                self.sequence = await self._end()
                self._based = True
            batch = await asyncio.to_thread(self._spool.waiting, _SIDE_BY_SIDE)
            records = [record for record, _ in batch]
            stored = await self._stored(records) if self._doubt else {}
            sent = await self._publish([record for record in records if record.message_id not in stored])
            self._acknowledged({record.message_id: record for record in records}, {**stored, **sent})
            await asyncio.to_thread(self._spool.done, batch[-1][1], self.sequence, self.last)
            self._taken()
        self._doubt = False
        self._empty.set()

    def _taken(self) -> None:
        metrics.AUDIT_FULL.set(0)
        metrics.AUDIT_SPOOL_BYTES.set(self._spool.size)
        self._refused = ""

    def _acknowledged(self, records: Mapping[str, Record], stored: Mapping[str, int]) -> None:
        now = self._bus.clock.monotonic()
        for name, sequence in sorted(stored.items(), key=lambda item: item[1]):
            self._kept.append((now, sequence, records[name]))
            if sequence > self.sequence:
                self.sequence, self.last = sequence, name
        while self._kept and now - self._kept[0][0] > _KEEP_S:
            self._kept.popleft()

    async def _find_cuts(self) -> None:
        """Find earlier runs whose last blocks are neither in the stream nor in the spool. The stream refuses
        deletion, so it can only have lost acknowledged blocks; and an unsynced spool may lose unsent ones.
        """
        end = await self._end()
        for state in self._earlier:
            if await self._lost_some(state, end):
                self.cuts.append(state)
        self._earlier.clear()

    async def _lost_some(self, state: SpoolState, end: int) -> bool:
        stream = self._bus.names.audit_stream
        if state.last:
            found = await self._bus.direct_at(stream, state.sequence)
            if found is None or found.headers.get("Nats-Msg-Id", "") != state.last:
                return True
        newest = max((at for _, _, _, at in state.heads), default=0)
        last = {message_id(state.run, number, name) for name, number, _, at in state.heads if newest - at <= _LAST_MS}
        start = max(1, min(state.sequence, end) - _FAR_BACK)
        missing = last - self._left
        async for item in self._bus.direct_scan(stream, self._bus.names.audit_subjects(), start=start):
            missing.discard(item.headers.get("Nats-Msg-Id", ""))
        return bool(missing)

    async def _end(self) -> int:
        return await self._bus.direct_last(self._bus.names.audit_stream, self._bus.names.audit_subjects())

    async def _look_back(self) -> None:
        """Store acknowledged blocks again, in order, if the broker came back without them."""
        end = await self._end()
        known = [self.sequence if self._based else end, end, *(sequence for _, sequence, _ in self._kept)]
        self.sequence, self._based = max(0, min(known) - _BACK), True
        records = [record for _, _, record in self._kept]
        stored = await self._stored(records)
        for record in records:
            if record.message_id not in stored:
                stored[record.message_id] = await self._put(record)
        self._kept.clear()
        self._acknowledged({record.message_id: record for record in records}, stored)

    async def _publish(self, records: Sequence[Record]) -> dict[str, int]:
        """Store blocks; return their sequences by message id.

        Raises:
            TetherError: of the first failure; others may have been stored.
        """
        results = await asyncio.gather(*[self._put(record) for record in records], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        sequences = [result for result in results if isinstance(result, int)]
        return {record.message_id: sequence for record, sequence in zip(records, sequences, strict=True)}

    async def _put(self, record: Record) -> int:
        headers = {"Nats-Msg-Id": record.message_id}
        return (await self._bus.publish_acked(record.subject, record.frame, headers=headers)).sequence

    async def _stored(self, records: Sequence[Record]) -> dict[str, int]:
        """Return those of ``records`` that the stream has, by message id: their acknowledgement may have been lost."""
        found: dict[str, int] = {}
        stream = self._bus.names.audit_stream
        for subject in {record.subject for record in records}:
            wanted = {record.message_id for record in records if record.subject == subject}
            async for item in self._bus.direct_scan(stream, subject, start=self.sequence + 1):
                name = item.headers.get("Nats-Msg-Id", "")
                if name in wanted:
                    found[name] = item.sequence
        return found

    async def drained(self, within_s: float) -> bool:
        """Wait until the spool is empty; return False on timeout."""
        self.wake.set()
        try:
            async with asyncio.timeout(within_s):
                while not self._spool.empty:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True
