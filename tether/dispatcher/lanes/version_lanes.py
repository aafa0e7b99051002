"""The lanes of every version: made where they are missing, those in which somebody waits before all others.

A broker that was restarted has lost its infer lanes, and with a thousand versions there are thousands to make. So lanes are made
side by side and in parts, and before each part the dispatcher looks in which lanes messages wait: a gateway stores its bundles
also where no consumer is yet. Infer lanes come before jobs lanes. What is there already, by the broker's own list, is brought up to
date last.
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
"""Lanes of one stream that are made between two looks at who waits."""
SIDE_BY_SIDE = 64
"""Requests to the broker at a time; it keeps 10,000, and drops all of them when there are more."""
_LOOK_S = 1.0
_AGAIN_S = 0.2


class VersionLanes:
    """Keeps the consumers of all lanes on one broker."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=10.0)
        self.wake = asyncio.Event()
        """Set when other lanes may be wanted."""
        self._wanted: set[LaneGroup] = set()
        self._done: set[LaneGroup] = set()
        """Groups whose lanes are there and as this process wants them."""
        self._as_wanted: dict[str, set[Lane]] = {}
        """By stream the lanes that this process made or brought up to date."""
        self._listed: dict[str, set[Lane]] = {}
        """By stream what the broker said that there is; a stream is not in here until it was asked."""

    def begin_anew(self, stream: str = "") -> None:
        """The broker, or one of its streams, may have lost consumers."""
        self._done.clear()
        if stream:
            self._listed.pop(stream, None)
        else:
            self._listed.clear()

    async def keep(self, models: Callable[[], Models], regions: Callable[[], Iterable[str]]) -> None:
        """Make what is missing until cancelled. Apart from everything else that the dispatcher does: with a thousand versions, or
        on a cluster that lost a server, it takes seconds."""
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
                        "lanes are missing: %s; trying again",
                        error,
                        extra={"action": "lanes_failed", "code": error.code},
                    )
            try:
                async with asyncio.timeout(pause):
                    await self.wake.wait()
            except TimeoutError:
                continue

    async def ensure(self, models: Models, regions: Iterable[str]) -> bool:
        """Make a part of what is missing; whether that was all.

        A stream that does not answer holds up no other one.

        Raises:
            JetStreamError, BrokerUnavailable: of the first stream that failed, when all others were seen to.
        """
        wanted = {LaneGroup(pool, ref, region) for pool, refs in models.items() for ref in refs for region in regions}
        self._forget(self._wanted - wanted)
        self._wanted = wanted
        missing = wanted - self._done
        if not missing:
            self._count()
            return True
        lanes = {group: _lanes(group) for group in missing}
        try:
            return await self._make(lanes)
        finally:
            self._done |= {group for group, found in lanes.items() if all(map(self._is_as_wanted, found))}
            self._count()

    def _forget(self, groups: Iterable[LaneGroup]) -> None:
        """Lanes of deleted versions are removed when they are empty; if they are wanted again, they are made."""
        for group in groups:
            self._done.discard(group)
            for lane in _lanes(group):
                self._as_wanted.get(self._bus.names.lane_stream(lane), set()).discard(lane)

    def _count(self) -> None:
        metrics.LANES.set(len(self._done))

    def _is_as_wanted(self, lane: Lane) -> bool:
        stream = self._bus.names.lane_stream(lane)
        return stream in self._listed and lane in self._as_wanted[stream]

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
            if stream not in self._as_wanted:
                self._as_wanted[stream] = await self._configured(stream) if there else set()
            self._listed[stream] = there
            self._as_wanted[stream] &= there
        as_wanted, there = self._as_wanted[stream], self._listed[stream]
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
        """What needs nothing; in a cluster with a server away this is not always told, and each lane is asked for."""
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
