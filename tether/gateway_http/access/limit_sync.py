"""Synchronizes demand per limit between gateways, so that a limit holds for all of them together.

Sends signed reports on a core NATS subject, a few times a second while a limited key is in use and there is
another gateway; none when idle. Gateways announce themselves on start and stop; one whose report is overdue
is presumed gone. While the broker is away every gateway keeps its share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from tether.bus.bus import Bus, Message
from tether.crypto import MessageType
from tether.domain.job import new_job_id
from tether.errors import BadEncoding, BrokerUnavailable
from tether.gateway_http.access.limit_meters import SILENT_S, TICK_S, LimitReport, Meter
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.wire import codec

_SOON_S = 0.005
"""Limits that become active within this time share one message."""

_HELLO_S = 10.0
"""Seconds between the probes for peers of an active gateway that knows none."""

_MAX_REPORTS = 1000
"""Reports in one message."""


class LimitMessage(msgspec.Struct, frozen=True):
    """One message of a gateway: its reports and requests. ``gateway`` identifies one run of one gateway."""

    gateway: str
    sequence: int
    reports: list[LimitReport] = []
    ask: list[str] = []
    """Limits that it needs reports of, even from gateways without demand."""
    hello: bool = False
    gone: bool = False


class LimitSync:
    """This gateway's active limits, and its peers."""

    def __init__(self, bus: Bus, tasks: Tasks, find: Callable[[str], Meter | None]) -> None:
        self._bus = bus
        self._tasks = tasks
        self._find = find
        self.own = new_job_id()
        self.members: dict[str, float] = {}
        """The other gateways, with the time of the last message of each."""
        self.meters: dict[str, Meter] = {}
        """Limits that are in use at any gateway."""
        self._sequences = itertools.count(1)
        self._left = False
        """Its last message is sent: a report after it would make others count this gateway again."""
        self._heard: dict[str, int] = {}
        self._owed: set[str] = set()
        self._asked_at = 0.0
        self._hello_at = 0.0
        self._soon = False
        self._active = asyncio.Event()

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[None]:
        """Receive and send reports until the block ends."""
        subscription = await self._bus.subscribe(self._bus.names.demand(), self._arrived)
        forget = self._bus.on_reconnect(self._reconnected)
        await self._bus.flush()
        await self._hello()
        task = self._tasks.spawn(self._report(), "report-demand")
        try:
            yield
        finally:
            task.cancel()
            forget()
            await self._send(gone=True)
            await subscription.unsubscribe()

    @property
    def _now(self) -> float:
        return self._bus.clock.monotonic()

    @property
    def resting(self) -> bool:
        """True if it has nothing to report."""
        return not self._active.is_set()

    def woken(self, name: str, meter: Meter) -> None:
        """Report a limit that has demand again, and request the peers' reports of it."""
        self.meters[name] = meter
        self._active.set()
        if self.members:
            self._report_soon()

    # reporting

    async def _report(self) -> None:
        while True:
            await self._active.wait()
            await asyncio.sleep(TICK_S)
            self._tick()
            if not self._reports():
                self._active.clear()

    def _tick(self) -> None:
        now = self._now
        if self._bus.connected:
            self._forget_members(now)
        else:
            self._hold(now)
        before = {name for name, meter in self.meters.items() if meter.demand}
        for name in [name for name, meter in self.meters.items() if meter.at_rest(now)]:
            if name not in before:
                del self.meters[name]
        for meter in self.meters.values():
            meter.tick(now)
        ended = {name for name in before if not self.meters[name].demand}
        self._owed |= ended
        if self.members:
            self._tasks.spawn(self._send_reports(), "tell-demand")
        elif before and now - self._hello_at > _HELLO_S:
            self._tasks.spawn(self._hello(), "tell-demand")

    def _forget_members(self, now: float) -> None:
        """Remove peers whose report is overdue, although they were asked or had demand."""
        if self._asked_at and now - self._asked_at > SILENT_S:
            for name in [name for name, heard in self.members.items() if heard < self._asked_at]:
                del self.members[name]
                self._heard.pop(name, None)
            self._asked_at = 0.0

    def _hold(self, now: float) -> None:
        self._asked_at = 0.0
        for meter in self.meters.values():
            meter.refresh(now)

    def _report_soon(self) -> None:
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_later(_SOON_S, self._report_now)

    def _report_now(self) -> None:
        self._soon = False
        self._tasks.spawn(self._send_reports(), "tell-demand")

    def _reports(self) -> list[str]:
        return [name for name, meter in self.meters.items() if meter.demand]

    async def _send_reports(self) -> None:
        """Send reports of active, requested and newly idle limits."""
        names = list(dict.fromkeys([*self._reports(), *self._owed]))
        self._owed.clear()
        unknown = [name for name in names if (meter := self.meters.get(name)) and meter.demand and meter.unknown()]
        if unknown and not self._asked_at:
            self._asked_at = self._now
        for start in range(0, max(1, len(names)), _MAX_REPORTS):
            part = names[start : start + _MAX_REPORTS]
            await self._send([self._report_of(name) for name in part], [name for name in unknown if name in part])

    def _report_of(self, name: str) -> LimitReport:
        meter = self.meters.get(name)
        return LimitReport(name, 0.0) if meter is None else meter.report(name, self._now)

    async def _hello(self) -> None:
        self._hello_at = self._now
        await self._send(hello=True)

    async def _send(
        self,
        reports: list[LimitReport] | None = None,
        ask: list[str] | None = None,
        *,
        hello: bool = False,
        gone: bool = False,
    ) -> None:
        if self._left:
            return
        self._left = gone
        subject = self._bus.names.demand()
        message = LimitMessage(self.own, next(self._sequences), reports or [], ask or [], hello, gone)
        frame = self._bus.signer.sign_envelope(
            MessageType.DEMAND, subject, codec.encode(message), message_id=new_job_id()
        )
        with contextlib.suppress(BrokerUnavailable):
            await self._bus.publish(subject, frame)

    # receiving

    def _reconnected(self) -> None:
        self._hold(self._now)
        self._tasks.spawn(self._hello(), "tell-demand")

    async def _arrived(self, message: Message) -> None:
        envelope = self._bus.verify_message(message, MessageType.DEMAND, once=True)
        if envelope is None:
            return
        try:
            demand = codec.decode(envelope.body, LimitMessage)
        except BadEncoding as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            return
        if demand.gateway == self.own or demand.sequence <= self._heard.get(demand.gateway, 0):
            return
        self._take(demand)

    def _take(self, demand: LimitMessage) -> None:
        sender = demand.gateway
        self._heard[sender] = demand.sequence
        if demand.gone:
            self.members.pop(sender, None)
            self._heard.pop(sender, None)
            return
        newcomer = sender not in self.members
        self.members[sender] = self._now
        for report in demand.reports:
            meter = self._find(report.name) if _possible(report) else None
            if meter is not None:
                meter.heard(sender, report, self._now)
                self.meters[report.name] = meter
        self._owed.update(demand.ask)
        if demand.hello or demand.ask or newcomer:
            self._report_soon()


def _possible(report: LimitReport) -> bool:
    """Return True if the values are finite and in range; a debt is at most what batches can cause."""
    return 0 <= report.demand < 1e9 and -1e9 < report.fill <= 1 and 0 <= report.open < 1 << 32
