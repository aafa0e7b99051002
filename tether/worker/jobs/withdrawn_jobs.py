"""Jobs of a lane that gateways withdrew because their callers left."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from tether.bus.bus import Bus, Message, Subscription
from tether.crypto import MAX_SKEW_MS, MessageType, Role
from tether.domain.job import CANCELLATION_TOLD_S, Lane, Withdrawal
from tether.errors import BadEncoding, RoleNotAllowed
from tether.process import metrics
from tether.wire import codec

_SKEW_S = MAX_SKEW_MS / 1000
_MOST = 65536
"""Jobs to remember; beyond that the oldest are forgotten, and run if they arrive."""


class WithdrawnJobs:
    """Withdrawn jobs of one lane until their deadlines; a job's bundle may arrive later."""

    def __init__(self, bus: Bus, lane: Lane) -> None:
        self._bus = bus
        self._lane = lane
        self.changed: Callable[[], None] = lambda: None
        """Called when jobs were added."""
        self._since = math.inf
        self._unhook: Callable[[], None] = lambda: None
        self._until: OrderedDict[str, float] = OrderedDict()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe. A broker with older permissions refuses it; then every job runs."""
        subject = self._bus.names.withdrawn(self._lane)
        self._subscription = await self._bus.subscribe(subject, self._arrived, confirmed=False)
        self._listening()
        self._unhook = self._bus.on_reconnect(self._listening)

    def _listening(self) -> None:
        self._since = self._bus.clock.utc()

    def would_know(self, stored_at: float) -> bool:
        """Return True if cancelled jobs of a message stored then (UTC seconds) would be known here."""
        return self._since + _SKEW_S < stored_at and self._bus.clock.utc() - stored_at < CANCELLATION_TOLD_S - _SKEW_S

    async def stop(self) -> None:
        self._unhook()
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    def __contains__(self, job: object) -> bool:
        return job in self._until

    async def _arrived(self, message: Message) -> None:
        envelope = self._bus.verify_message(message, MessageType.RESULT)
        if envelope is None:
            return
        if envelope.header.role is not Role.GATEWAY:
            self._bus.count_refused(RoleNotAllowed("only gateways withdraw jobs"), message.subject)
            return
        try:
            withdrawal = codec.decode(envelope.body, Withdrawal)
        except BadEncoding as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            return
        self._forget(self._bus.clock.utc())
        for job in withdrawal.jobs:
            self._until[job] = withdrawal.until
        while len(self._until) > _MOST:
            self._until.popitem(last=False)
        self.changed()

    def _forget(self, now: float) -> None:
        """Drop expired jobs from the oldest on; one with a later deadline keeps those behind it."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
