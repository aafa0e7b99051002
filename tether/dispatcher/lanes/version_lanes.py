"""Creates missing lanes of all versions, those with waiting messages first.

A restarted broker has lost its infer lanes, and a thousand versions have thousands. So lanes are created
concurrently and in parts, and before each part the dispatcher reads which lanes have messages: a gateway
stores bundles even where no consumer exists yet. Infer lanes come before jobs lanes. Lanes that the broker
lists already are updated last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from tether.bus.bus import Bus
from tether.dispatcher.assignments import LaneGroup, Models
from tether.domain.job import Lane, LaneKind
from tether.errors import BrokerUnavailable, TetherError
from tether.process import metrics
from tether.process.log_rate_limiter import LogRateLimiter
from tether.streams.lane_admin import configured_lanes, consumers_of, waiting_in
from tether.streams.layout import ensure_lane, lanes_of

log = logging.getLogger(__name__)

A_PART = 256
"""Lanes of one stream to create between two reads of waiting messages."""
SIDE_BY_SIDE = 64
"""Concurrent requests to the broker; it queues 10,000, and drops all of them if there are more."""
_LOOK_S = 1.0
_AGAIN_S = 0.2


class VersionLanes:
    """Creates and updates the consumers of all lanes on one broker."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=10.0)
        self.wake = asyncio.Event()
        """Set when the wanted lanes may have changed."""
        self._wanted: set[LaneGroup] = set()
        self._configured_groups: set[LaneGroup] = set()
        """Groups whose lanes exist with the wanted configuration."""
        self._configured_lanes: dict[str, set[Lane]] = {}
        """By stream, the lanes that this process created or updated."""
        self._listed: dict[str, set[Lane]] = {}
        """By stream, the lanes that the broker listed; a stream that was not asked is missing."""

    def reset(self, stream: str = "") -> None:
        """Assume that the broker, or one of its streams, lost consumers."""
        self._configured_groups.clear()
        if stream:
            self._listed.pop(stream, None)
        else:
            self._listed.clear()

    async def keep(self, models: Callable[[], Models], regions: Callable[[], Iterable[str]]) -> None:
        """Create missing lanes until cancelled.

        A task of its own: with a thousand versions, or on a cluster that lost a server, it takes seconds.
        """
        while True:
            self.wake.clear()
            pause = _LOOK_S
            try:
                if not await self.ensure(models(), regions()):
                    continue
            except TetherError as error:
                pause = _AGAIN_S
                if self._told.passes(error.code) is not None:
                    log.warning(
                        "lanes are missing: %s; retrying",
                        error,
                        extra={"action": "lanes_failed", "code": error.code},
                    )
            try:
                async with asyncio.timeout(pause):
                    await self.wake.wait()
            except TimeoutError:
                continue

    async def ensure(self, models: Models, regions: Iterable[str]) -> bool:
        """Create a part of the missing lanes; return True if none is missing.

        A stream that does not answer delays no other one.

        Raises:
            JetStreamError, BrokerUnavailable: of the first stream that failed, after all others.
        """
        wanted = {LaneGroup(pool, ref, region) for pool, refs in models.items() for ref in refs for region in regions}
        self._forget(self._wanted - wanted)
        self._wanted = wanted
        missing = wanted - self._configured_groups
        if not missing:
            self._count()
            return True
        lanes = {group: _lanes(group) for group in missing}
        try:
            return await self._make(lanes)
        finally:
            self._configured_groups |= {group for group, found in lanes.items() if all(map(self._is_as_wanted, found))}
            self._count()

    def _forget(self, groups: Iterable[LaneGroup]) -> None:
        """Forget lanes of deleted versions, which are removed once empty; they are created again if wanted."""
        for group in groups:
            self._configured_groups.discard(group)
            for lane in _lanes(group):
                self._configured_lanes.get(self._bus.names.lane_stream(lane), set()).discard(lane)

    def _count(self) -> None:
        metrics.LANES.set(len(self._configured_groups))

    def _is_as_wanted(self, lane: Lane) -> bool:
        stream = self._bus.names.lane_stream(lane)
        return stream in self._listed and lane in self._configured_lanes[stream]

    async def _make(self, lanes: Mapping[LaneGroup, Sequence[Lane]]) -> bool:
        infer: dict[str, list[Lane]] = {}
        jobs: dict[str, list[Lane]] = {}
        for lane in (lane for found in lanes.values() for lane in found):
            streams = infer if lane.kind is LaneKind.INFER else jobs
            streams.setdefault(self._bus.names.lane_stream(lane), []).append(lane)
        failed: list[BaseException] = []
        all_made = await self._in_streams(infer, failed)
        if all_made or failed:
            all_made = await self._in_streams(jobs, failed) and all_made
        if failed:
            raise failed[0]
        return all_made

    async def _in_streams(self, streams: Mapping[str, Sequence[Lane]], failed: list[BaseException]) -> bool:
        gate = asyncio.Semaphore(SIDE_BY_SIDE)
        parts = [self._in_stream(stream, lanes, gate) for stream, lanes in streams.items()]
        results = await asyncio.gather(*parts, return_exceptions=True)
        failed += [result for result in results if isinstance(result, BaseException)]
        return all(result is True for result in results)

    async def _in_stream(self, stream: str, lanes: Sequence[Lane], gate: asyncio.Semaphore) -> bool:
        if stream not in self._listed:
            there = await consumers_of(self._bus, stream)
            if stream not in self._configured_lanes:
                self._configured_lanes[stream] = await self._configured(stream) if there else set()
            self._listed[stream] = there
            self._configured_lanes[stream] &= there
        as_wanted, there = self._configured_lanes[stream], self._listed[stream]
        left = [lane for lane in lanes if lane not in as_wanted]
        if len(left) > A_PART:
            waiting = await waiting_in(self._bus, stream)
            left.sort(key=lambda lane: (lane in there, lane not in waiting))
        failed: list[TetherError] = []
        await asyncio.gather(*[self._one(lane, as_wanted, gate, failed) for lane in left[:A_PART]])
        if failed:
            raise failed[0]
        return len(left) <= A_PART

    async def _configured(self, stream: str) -> set[Lane]:
        """Return correctly configured lanes; with a cluster server down the list may be incomplete."""
        try:
            return await configured_lanes(self._bus, stream, self._bus.settings)
        except BrokerUnavailable:
            return set()

    async def _one(self, lane: Lane, as_wanted: set[Lane], gate: asyncio.Semaphore, failed: list[TetherError]) -> None:
        async with gate:
            if failed:
                return
            try:
                await ensure_lane(self._bus, lane, self._bus.settings)
            except TetherError as error:
                failed.append(error)
            else:
                as_wanted.add(lane)


def _lanes(group: LaneGroup) -> list[Lane]:
    return lanes_of(group.ref.model, group.ref.version, group.region, group.pool)
