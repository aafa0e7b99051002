"""Finds lanes whose consumer does not deliver their messages, and recreates that consumer.

A consumer remembers the last sequence it delivered and never goes back. After a power cut a stream may be
shorter than its consumer remembers, because the broker had not synced its last messages: the consumer then
skips new messages until the stream has grown past that sequence. (nats-server 2.15 corrects a consumer that
it recovers itself, but not one that is created over the files of one whose description was lost, as after a
cut soon after its creation.) Three cases are detected:

- **Ahead**: a consumer has delivered a sequence that its stream does not have. All consumers are checked when
  this process starts or reconnects, and when a stream was recreated, its last sequence went down, or it has
  more consumers.
- **Stuck**: a lane has messages that its consumer counts neither as pending nor as unacknowledged. Lanes with
  messages at two checks in a row are checked: new messages may have passed the remembered sequence already.
- **Missing**: such a lane has no consumer.

Otherwise a check costs one STREAM.INFO for each stream, however many lanes it has. A recreated consumer
delivers everything in the lane, also messages that workers process: results are fenced, so the first commit
of a job wins.
"""

from __future__ import annotations

import asyncio
import logging

from tether.bus.bus import Bus
from tether.domain.job import Lane
from tether.errors import TetherError
from tether.process import metrics
from tether.streams.lane_admin import (
    StreamState,
    consumer_state,
    consumer_states,
    lane_streams,
    remove_lane,
    stream_state,
)
from tether.streams.layout import ensure_lane

log = logging.getLogger(__name__)

CHECK_S = 3.0
MOST_LANES = 64
"""Maximum lanes of a stream in one check; the others follow in the next checks."""

_CONFIRMATIONS = 2
"""Checks in a row that must find a lane stuck."""


class LaneCheck:
    """Checks the consumers of all lanes; runs in the dispatcher, in several at once too."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._seen: dict[str, StreamState] = {}
        self._stuck: dict[Lane, int] = {}
        """Lanes with skipped messages, and the number of checks in a row that found them."""
        self._asked: dict[Lane, int] = {}
        """Lanes that had messages, and the number of the check that last read them."""
        self._number = 0
        self._wake = asyncio.Event()
        self._forget = bus.on_reconnect(self.reset)

    def reset(self) -> None:
        """Check everything again, now: the broker may have restarted."""
        self._seen.clear()
        self._wake.set()

    async def run(self) -> None:
        """Run a check periodically until cancelled."""
        try:
            while True:
                self._wake.clear()
                await self.check()
                try:
                    async with asyncio.timeout(CHECK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            self._forget()

    async def check(self) -> None:
        """Compare every stream with its consumers once, and recreate consumers that do not deliver."""
        self._number += 1
        waiting: set[Lane] = set()
        try:
            for stream in await lane_streams(self._bus):
                waiting |= await self._check_stream(stream)
        except TetherError as error:
            log.info("could not compare lanes: %s", error, extra={"action": "lanes_not_compared", "code": error.code})
        for lane in self._asked.keys() - waiting:
            self._asked.pop(lane)
            self._stuck.pop(lane, None)

    async def _check_stream(self, stream: str) -> set[Lane]:
        """Return the lanes of a stream with messages at this check and the one before.

        A stream that does not answer delays no other one, and is checked completely the next time.
        """
        before = self._seen.pop(stream, None)
        try:
            state = await stream_state(self._bus, stream)
            if state is None:
                return set()
            found: set[Lane] = set()
            if before is None or _changed(before, state):
                await self._compare_all(stream)
            else:
                found = await self._compare_waiting(state.waiting.keys() & before.waiting.keys())
        except TetherError as error:
            extra = {"action": "lanes_not_compared", "code": error.code}
            log.info("could not compare the lanes of %s: %s", stream, error, extra=extra)
            return set()
        self._seen[stream] = state
        return found

    async def _compare_all(self, stream: str) -> None:
        """Read consumers before the stream, which only grows meanwhile; skip in-memory infer streams."""
        if self._bus.names.is_infer_stream(stream):
            return
        consumers = await consumer_states(self._bus, stream)
        state = await stream_state(self._bus, stream)
        for consumer in consumers:
            lane = self._bus.names.parse_lane_consumer(consumer.name)
            if state is not None and lane is not None and consumer.delivered > state.last:
                await self.recreate(lane, "ahead", f"it had delivered {consumer.delivered} of {state.last} messages")

    async def _compare_waiting(self, subjects: set[str]) -> set[Lane]:
        found = [lane for subject in subjects if (lane := self._bus.names.parse_lane(subject)) is not None]
        found.sort(key=lambda lane: self._asked.get(lane, 0))
        for lane in found[:MOST_LANES]:
            self._asked[lane] = self._number
            await self._compare(lane)
        return set(found)

    async def _compare(self, lane: Lane) -> None:
        stream, subject = self._bus.names.lane_stream(lane), self._bus.names.lane(lane)
        before = await consumer_state(self._bus, lane)
        state = await stream_state(self._bus, stream, subject)
        after = await consumer_state(self._bus, lane)
        if state is None:
            return
        if before is None and after is None:
            await self.recreate(lane, "missing", "it was missing")
        elif before != after or after is None or state.waiting.get(subject, 0) <= after.pending + after.unacked:
            # a lane that changes during the check is not stuck, or its state is unclear
            self._stuck.pop(lane, None)
        else:
            self._stuck[lane] = self._stuck.get(lane, 0) + 1
            if self._stuck[lane] >= _CONFIRMATIONS:
                skipped = state.waiting[subject] - after.pending - after.unacked
                await self.recreate(lane, "stuck", f"it had skipped {skipped} messages")

    async def recreate(self, lane: Lane, reason: str, why: str) -> None:
        self._stuck.pop(lane, None)
        if reason != "missing":
            await remove_lane(self._bus, lane)
        await ensure_lane(self._bus, lane, self._bus.settings)
        metrics.LANES_MADE_AGAIN.labels(reason).inc()
        log.warning(
            "recreated the consumer of lane %s: %s",
            self._bus.names.lane(lane),
            why,
            extra={"action": "lane_made_again", "reason": reason, "model": lane.model},
        )


def _changed(before: StreamState, now: StreamState) -> bool:
    return now.created != before.created or now.last < before.last or now.consumers > before.consumers
