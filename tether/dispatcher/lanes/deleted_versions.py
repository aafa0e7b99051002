"""Deleted versions: their lanes are worked off and then removed.

Nothing of it is remembered anywhere but at the broker: a version was deleted when its entry says so, and its lanes are there
while they have a consumer or a message. So any dispatcher can go on where another one stopped, and two of them do no harm. What
is published to a lane after its consumers are gone is found by the next look, and the lane is made anew for it.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.dispatcher.assignments import LaneGroup, Place
from tether.domain.manifest import ModelRef
from tether.streams.lane_admin import lanes_there, lanes_with_messages, remove_lane
from tether.streams.layout import ensure_lane, lanes_of

log = logging.getLogger(__name__)

KEEP_S = 10.0
"""Lanes stay until they were empty for this long: a gateway that has not heard yet stores a job for as long at most."""
_STEP_S = 1.0
_TURN_S = 15.0
"""How long a worker may take to empty lanes before another one is asked: it may be of a version that cannot."""


@dataclass
class _DeletedLanes:
    """What is known of the lanes of a deleted version; times are this process's monotonic seconds."""

    made: bool = False
    """Their consumers were seen to by this process, on this broker."""
    found_at: float = 0.0
    empty_since: float | None = None
    leaving: bool = False
    """No worker is told to pull them any more; the next step removes them if they are still empty."""


class DeletedVersionLanes:
    """Follows the lanes of deleted versions until they are gone."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._models = KvBucket(bus, "models")
        self._deleted: set[ModelRef] = set()
        self._ends: dict[LaneGroup, _DeletedLanes] = {}
        self._next = 0.0

    def begin_anew(self) -> None:
        """The broker may have lost consumers that it kept in memory."""
        for end in self._ends.values():
            end.made = False

    def groups(self) -> dict[LaneGroup, int]:
        """The lanes that a worker should work off, and how many were asked to before it."""
        groups = [group for group, end in self._ends.items() if not end.leaving]
        groups.sort(key=lambda group: (group.pool, group.ref.model, group.ref.version, group.region))
        return {group: self._turn(self._ends[group]) for group in groups}

    def _turn(self, end: _DeletedLanes) -> int:
        until = self._bus.clock.monotonic() if end.empty_since is None else end.empty_since
        return int((until - end.found_at) / _TURN_S)

    async def look(self, models: Container[ModelRef], places: Iterable[Place]) -> list[Place]:
        """Find lanes of deleted versions; returns those of ``places`` that are deleted and have no lanes any more.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        there = await lanes_there(self._bus)
        groups = {LaneGroup(lane.pool, ModelRef(lane.model, lane.version), lane.region) for lane in there}
        for group in groups:
            if group not in self._ends and await self._was_deleted(group.ref, models):
                self._ends[group] = _DeletedLanes(found_at=self._bus.clock.monotonic())
                log.info("lanes of a deleted version", extra={"action": "lanes_ended", "model": group.ref.model})
        lasting = {(group.pool, group.ref) for group in groups}
        return [place for place in places if place not in lasting and await self._was_deleted(place[1], models)]

    async def _was_deleted(self, ref: ModelRef, models: Container[ModelRef]) -> bool:
        """Only what the entry itself says counts: that this process knows of no version proves nothing."""
        if ref in models:
            return False
        if ref not in self._deleted and await self._models.was_deleted(
            self._bus.names.version_key(ref.model, ref.version)
        ):
            self._deleted.add(ref)
        return ref in self._deleted

    async def step(self) -> None:
        """Once a second: make lanes that somebody can work off, and remove those that stayed empty.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        now = self._bus.clock.monotonic()
        if not self._ends or now < self._next:
            return
        self._next = now + _STEP_S
        full = await lanes_with_messages(self._bus)
        busy = {LaneGroup(lane.pool, ModelRef(lane.model, lane.version), lane.region) for lane in full}
        for group, end in list(self._ends.items()):
            if group in busy:
                end.empty_since, end.leaving = None, False
                await self._made(group, end)
            elif end.empty_since is None:
                end.empty_since = now
            elif end.leaving:
                await self._remove(group)
            elif now - end.empty_since >= KEEP_S:
                end.leaving = True

    async def _made(self, group: LaneGroup, end: _DeletedLanes) -> None:
        if not end.made:
            for lane in lanes_of(group.ref.model, group.ref.version, group.region, group.pool):
                await ensure_lane(self._bus, lane, self._bus.settings)
            end.made = True

    async def _remove(self, group: LaneGroup) -> None:
        for lane in lanes_of(group.ref.model, group.ref.version, group.region, group.pool):
            await remove_lane(self._bus, lane)
        del self._ends[group]
        log.info("lanes removed", extra={"action": "lanes_removed", "model": group.ref.model})
