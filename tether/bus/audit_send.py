"""Moves blocks of the audit log from the spool to the stream: each once, each chain in its order, however long it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tether import metrics
from tether.audit import Record
from tether.bus.audit_spool import Spool
from tether.bus.connection import Bus
from tether.errors import BrokerUnavailable, QueueFull, TetherError

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 64
"""Blocks on their way at once, each of another chain."""

_AGAIN_S = 0.5
_REFUSED_S = 5.0


class Sender:
    """``before``: sequences that earlier runs know the stream has everything up to; None when they left nothing."""

    def __init__(self, bus: Bus, spool: Spool, before: Sequence[int] | None) -> None:
        self._bus = bus
        self._spool = spool
        self.wake = asyncio.Event()
        self._empty = asyncio.Event()
        self.sequence = min(before, default=0) if before else 0
        """The stream has every block that was made before this message."""
        self._based = before is not None
        self._doubt = before is not None
        self._refused = ""

    async def run(self) -> None:
        """Send until cancelled."""
        forget = self._bus.on_reconnect(self.wake.set)
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

    async def _tried(self) -> float | None:
        """Send what there is; how long to wait before another try, None: until there is more."""
        try:
            await self._send_all()
        except BrokerUnavailable as error:
            log.debug("audit blocks wait: %s", error, extra={"action": "audit_waits"})
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
        metrics.AUDIT_FULL.set(1 if isinstance(error, QueueFull) else 0)
        if self._refused != error.code:
            log.error(
                "the stream does not take audit blocks: %s",
                error,
                extra={"action": "audit_refused", "code": error.code},
            )
        self._refused = error.code

    async def _send_all(self) -> None:
        while not self._spool.empty:
            self._empty.clear()
            if not self._based:
                names = self._bus.names
                self.sequence = await self._bus.direct_last(names.audit_stream, names.audit_subjects())
                self._based = True
            batch = await asyncio.to_thread(self._spool.waiting, _SIDE_BY_SIDE)
            records = [record for record, _ in batch]
            stored = await self._stored(records) if self._doubt else {}
            sent = await self._publish([record for record in records if record.message_id not in stored])
            self.sequence = max([self.sequence, *stored.values(), *sent])
            await asyncio.to_thread(self._spool.done, batch[-1][1])
            self._taken()
        self._doubt = False
        self._empty.set()

    def _taken(self) -> None:
        metrics.AUDIT_FULL.set(0)
        metrics.AUDIT_SPOOL_BYTES.set(self._spool.size)
        self._refused = ""

    async def _publish(self, records: Sequence[Record]) -> list[int]:
        """Store blocks; their sequences.

        Raises:
            TetherError: of the first that was not; the others may have been.
        """
        results = await asyncio.gather(*[self._put(record) for record in records], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, int)]

    async def _put(self, record: Record) -> int:
        headers = {"Nats-Msg-Id": record.message_id}
        return (await self._bus.publish_acked(record.subject, record.frame, headers=headers)).sequence

    async def _stored(self, records: Sequence[Record]) -> dict[str, int]:
        """Those of ``records`` that the stream has, by message id: an acknowledgement may have been lost long ago."""
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
        """Wait until the spool is empty; False when it is not in time."""
        self.wake.set()
        try:
            async with asyncio.timeout(within_s):
                while not self._spool.empty:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True
