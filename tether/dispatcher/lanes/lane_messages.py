"""Reads which bundles are in a lane, by the message id that their jobs' records name.

Each message is read once, some seconds after it was stored, and again only after it was delivered: a
work-queue stream keeps a message until it is acknowledged.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.domain.job import Lane
from tether.streams.lane_admin import consumer_state, message_at, next_message

_SIDE_BY_SIDE = 16


@dataclass
class LaneMessages:
    """The bundles in a version's jobs lane, in every region: ``lane`` has the region ``*``."""

    bus: Bus
    lane: Lane
    there: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Sequence and subject of each bundle found and not seen removed."""
    _next: int = 1

    async def update(self) -> set[Lane]:
        """Update from the stream; return the lanes whose consumer has skipped a stored message.

        Raises:
            JetStreamError, BrokerUnavailable: the stream could not be read.
        """
        stream, subject = self.bus.names.lane_stream(self.lane), self.bus.names.lane(self.lane)
        while (found := await next_message(self.bus, stream, subject, self._next)) is not None:
            self._next = found.sequence + 1
            self.there[found.id] = (found.sequence, found.subject)
        skipped: set[Lane] = set()
        for name in {subject for _, subject in self.there.values()}:
            lane = self.bus.names.parse_lane(name)
            if lane is not None and await self._settled(stream, lane, name):
                skipped.add(lane)
        return skipped

    async def _settled(self, stream: str, lane: Lane, subject: str) -> bool:
        """Drop the acknowledged bundles of one lane; return True if its consumer has skipped a message."""
        consumer = await consumer_state(self.bus, lane)
        if consumer is None:
            return False
        skipped = False
        delivered = [
            (bundle, sequence)
            for bundle, (sequence, name) in self.there.items()
            if name == subject and sequence <= consumer.delivered
        ]
        for start in range(0, len(delivered), _SIDE_BY_SIDE):
            part = delivered[start : start + _SIDE_BY_SIDE]
            found = await asyncio.gather(*[message_at(self.bus, stream, sequence) for _, sequence in part])
            for (bundle, sequence), message in zip(part, found, strict=True):
                if message is None or message.id != bundle:
                    del self.there[bundle]
                elif sequence <= consumer.acked:
                    skipped = True
        return skipped
