"""Decides how many messages to pull from each lane of a version: enough for its instances, no more.

With ``least_connections`` a worker pulls from a lane while its next message is expected to begin soon
(:mod:`tether.worker.scheduling.pull_pace`). If a run takes longer than expected, open pulls are cancelled,
and messages idle for :data:`HOLD_S` are handed back, so that an idle worker gets them at once. With the other
strategies a worker keeps its number of open pulls, see docs/adr/0026-load-balancing.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from tether.model.config import LoadBalancing
from tether.process.clock import Clock
from tether.streams.lane_consumer import LaneConsumer
from tether.worker.models.load_spec import RunSpec
from tether.worker.runs.job_runs import Runs
from tether.worker.scheduling import batching, pull_balance
from tether.worker.scheduling.bundle import Bundle
from tether.worker.scheduling.job_turns import LEVELS, JobTicket, RunQueue, level_of
from tether.worker.scheduling.pull_pace import AHEAD_S

HOLD_S = 0.1
"""Seconds that a busy worker keeps a message of which no job runs."""

_OPENING_S = 0.05
"""Seconds that a less urgent job waits for a more urgent message that is being decoded."""


class LanePulls:
    """Controls the pulls of one version's lanes by level, and counts its runs."""

    def __init__(
        self, pulls: Sequence[LaneConsumer], queue: RunQueue, runs: Runs, clock: Clock, *, slots: int, weight: int
    ) -> None:
        self.pulls = {level_of(pull.lane): pull for pull in pulls}
        self.arrived = asyncio.Event()
        """Set when the queue may hold new jobs."""
        self.filling_batch: list[JobTicket] = []
        """Jobs that wait for more jobs to fill a batch."""
        self.instances = 1
        self.running = 0
        self._strategy = LoadBalancing.LEAST_CONNECTIONS
        self._queue = queue
        self._runs = runs
        self._clock = clock
        self._slots = slots
        self._weight = weight
        self._decoding = [0] * LEVELS
        self._decoded = asyncio.Event()
        self._handed_back = [False] * LEVELS
        """Levels that are not pulled: a message was handed back, and none could begin since."""
        self._begun_at = clock.monotonic()
        self._durable_paused = False
        """Whether durable jobs are paused, because their outcomes cannot be stored."""

    def configure(self, strategy: LoadBalancing, copies: int) -> None:
        """Set the strategy and the number of concurrent runs, ``copies``, from now on."""
        self._strategy = strategy
        self.instances = copies
        self.share()

    @property
    def _pulls_on_demand(self) -> bool:
        return self._strategy is LoadBalancing.LEAST_CONNECTIONS

    def share(self) -> None:
        """Update the pulls of every lane by the strategy and the pending jobs."""
        most = max(self._slots, self.instances + 1)
        if not self._pulls_on_demand:
            turns = pull_balance.turns(self._strategy, self._weight, self._runs.capacity)
            for level, pull in self.pulls.items():
                pull.share(0 if level and self._durable_paused else most - self.instances, turns)
            return
        stalled = self._stalled(self._clock.monotonic())
        for level, pull in self.pulls.items():
            waiting = self._queue.jobs_ahead(level)
            credit = self._runs.pace.pull_target(
                running=self.running, copies=self.instances, waiting=waiting, most=most
            )
            pull.share(0 if stalled or self._handed_back[level] or (level and self._durable_paused) else credit)

    def pause_durable(self, *, durable: bool) -> None:
        """Pause or resume durable jobs; synchronous jobs go on."""
        if durable != self._durable_paused:
            self._durable_paused = durable
            self.arrived.set()
            self.share()

    def _stalled(self, now: float) -> bool:
        """Return True if the current runs take longer than expected."""
        return self.running >= self.instances and now - self._begun_at > AHEAD_S

    # messages

    def on_message(self, level: int) -> None:
        """Count a message that arrived and is being decoded."""
        self._decoding[level] += 1

    def on_decoded(self, level: int) -> None:
        """Count a message as decoded: its jobs are queued, or it had none."""
        self._decoding[level] -= 1
        self._decoded.set()
        self.arrived.set()
        self.share()

    # runs

    def began(self) -> None:
        self.running += 1
        self._begun_at = self._clock.monotonic()
        self.share()

    def ended(self) -> None:
        self.running -= 1

    async def next_level(self) -> int:
        """Wait for jobs and return the next run's level; more urgent messages being decoded go first."""
        looked = False
        while True:
            now = self._clock.monotonic()
            order = self._rank_levels(now)
            best = next((level for level in order if self._queue.has(level)), None)
            if best is None:
                self.share()
                self.arrived.clear()
                await self.arrived.wait()
                looked = False
                continue
            unknown = [level for level in order[: order.index(best)] if not self._known_empty(level)]
            if looked or not unknown:
                return best
            looked = True
            await asyncio.gather(*[self._check_lane(level) for level in unknown])

    async def wait_for_more(self, level: int, serving: RunSpec) -> bool:
        """Wait up to the configured delay for more jobs in the next run. Return True if any came."""
        if not serving.delay_s:
            return False
        group = list(self._queue.candidates(level))
        left = group[0].bundle.last_active_at + serving.delay_s - self._clock.monotonic()
        jobs = [ticket.job for ticket in group]
        full = not batching.should_wait_for_more(jobs, serving.batching.max_batch_size, serving.preferred)
        if group[0].alone or full or left <= 0:
            return False
        self.filling_batch = group
        self.arrived.clear()
        try:
            async with asyncio.timeout(left):
                await self.arrived.wait()
        except TimeoutError:
            return False
        finally:
            self.filling_batch = []
        return True

    def _rank_levels(self, now: float) -> list[int]:
        """Return the order of levels, after recording which have no jobs and which could begin now."""
        urgent = False
        for level in range(LEVELS):
            self._handed_back[level] = self._handed_back[level] and urgent
            if self._queue.has(level):
                urgent = True
            elif self._known_empty(level):
                self._queue.mark_served(level, now)
        return [0] if self._durable_paused else self._queue.order(now)

    def _known_empty(self, level: int) -> bool:
        return not self._decoding[level] and self.pulls[level].empty

    async def _check_lane(self, level: int) -> None:
        if not self._decoding[level]:
            await self.pulls[level].check()
        try:
            async with asyncio.timeout(_OPENING_S):
                while self._decoding[level]:
                    self._decoded.clear()
                    await self._decoded.wait()
        except TimeoutError:
            return
        if not self._queue.has(level):
            self._queue.mark_served(level, self._clock.monotonic())

    def to_hand_back(self, bundles: Iterable[Bundle]) -> list[Bundle]:
        """Return the bundles to hand back: every instance is busy, and none of their jobs ran for a while.

        Call it every :data:`AHEAD_S`; it cancels open pulls too.
        """
        now = self._clock.monotonic()
        if not self._pulls_on_demand or self.running < self.instances:
            return []
        if self._stalled(now):
            self.share()
        found = [bundle for bundle in bundles if _can_hand_back(bundle, now)]
        for bundle in found:
            self._handed_back[level_of(bundle.delivery.lane)] = True
        return found


def _can_hand_back(bundle: Bundle, now: float) -> bool:
    """Return True if an idle bundle may be redelivered: results of durable jobs are stored, infer jobs have not run."""
    if bundle.running or bundle.leaving or now - bundle.last_active_at <= HOLD_S:
        return False
    return not bundle.begun or bundle.durable
