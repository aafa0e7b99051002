"""Drains the lanes of deleted versions and then removes them.

All state is in the broker: a version's entry says that it was deleted, and its lanes exist while they have a
consumer or a message. So any dispatcher can continue where another one stopped, also at the same time. A
message published to a lane after its consumers are gone is found by the next check, which recreates the lane.
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
"""Seconds that lanes must be empty before removal: a gateway may still store jobs for as long."""
_STEP_S = 1.0
_TURN_S = 15.0
"""Seconds that a worker gets to empty lanes before another one is asked: it may be of a version that cannot."""


@dataclass
class _DeletedLanes:
    """State of the lanes of a deleted version; times are this process's monotonic seconds."""

    made: bool = False
    """Whether this process has created their consumers on this broker."""
    found_at: float = 0.0
    empty_since: float | None = None
    leaving: bool = False
    """Whether no worker pulls them any longer; the next step removes them if they are still empty."""


class DeletedVersionLanes:
    """Tracks the lanes of deleted versions until they are removed."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._models = KvBucket(bus, "models")
        self._deleted: set[ModelRef] = set()
        self._ends: dict[LaneGroup, _DeletedLanes] = {}
        self._next = 0.0

    def reset(self) -> None:
        """Assume that the broker lost its in-memory consumers."""
        for end in self._ends.values():
            end.made = False

    def groups(self) -> dict[LaneGroup, int]:
        """Return the lanes that a worker should drain, and how many workers were asked before."""
        groups = [group for group, end in self._ends.items() if not end.leaving]
        groups.sort(key=lambda group: (group.pool, group.ref.model, group.ref.version, group.region))
        return {group: self._turn(self._ends[group]) for group in groups}

    def _turn(self, end: _DeletedLanes) -> int:
        until = self._bus.clock.monotonic() if end.empty_since is None else end.empty_since
        return int((until - end.found_at) / _TURN_S)

    async def find(self, models: Container[ModelRef], places: Iterable[Place]) -> list[Place]:
        """Find lanes of deleted versions; return those of ``places`` that are deleted and have no lanes left.

        Raises:
            JetStreamError, BrokerUnavailable: the lanes could not be listed.
        """
        there = await lanes_there(self._bus)
        groups = {LaneGroup(lane.pool, ModelRef(lane.model, lane.version), lane.region) for lane in there}
        for group in groups:
            if group not in self._ends and await self._was_deleted(group.ref, models):
                self._ends[group] = _DeletedLanes(found_at=self._bus.clock.monotonic())
                log.info("found lanes of a deleted version", extra={"action": "lanes_ended", "model": group.ref.model})
        lasting = {(group.pool, group.ref) for group in groups}
        return [place for place in places if place not in lasting and await self._was_deleted(place[1], models)]

    async def _was_deleted(self, ref: ModelRef, models: Container[ModelRef]) -> bool:
        """Return True if the entry itself says deleted; an unknown version is not proof."""
        if ref in models:
            return False
        if ref not in self._deleted and await self._models.was_deleted(
            self._bus.names.version_key(ref.model, ref.version)
        ):
            self._deleted.add(ref)
        return ref in self._deleted

    async def step(self) -> None:
        """Create lanes to drain, and remove those that stayed empty; call it once a second.

        Raises:
            JetStreamError, BrokerUnavailable: a lane could not be changed.
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
        log.info("removed the lanes of a deleted version", extra={"action": "lanes_removed", "model": group.ref.model})
