"""Queue of a version's pending jobs; selects which run next. Pure: no I/O, time is an argument.

The unit is the run: each free instance takes the next run from the most urgent level that has jobs. A level
is a kind of lane: synchronous jobs, then durable jobs of high, normal and low priority. Within a level the
oldest job goes first, and jobs of equal shape join it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from tether.domain.job import Job, Lane, LaneKind, Priority
from tether.worker.scheduling.batching import Key, Parts, Run, Segment, Source, key_of
from tether.worker.scheduling.bundle import Bundle

LEVELS = 4
"""0: synchronous jobs; 1 to 3: durable jobs of high, normal and low priority."""

_LEVEL = {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}


def level_of(lane: Lane) -> int:
    """Return the level of a lane; 0 is the most urgent."""
    return 0 if lane.kind is LaneKind.INFER else _LEVEL[lane.priority]


class JobTicket:
    """An unfinished job. ``alone``: it shares no run. ``whole``: it is not split either."""

    __slots__ = ("alone", "attempt", "began", "bundle", "ended", "job", "next", "parts", "source", "whole")

    def __init__(self, job: Job, bundle: Bundle, *, alone: bool = False, whole: bool = False) -> None:
        self.job = job
        self.bundle = bundle
        self.alone = alone or whole
        self.whole = whole
        self.source = Source(job)
        self.next = 0
        """Index of its first row that has not begun."""
        self.parts = Parts(self.source)
        self.attempt = 0 if bundle.suspect else 1
        """Number of this attempt; 0: not known yet."""
        self.began = 0.0
        """When its first run began, UTC seconds."""
        self.ended = False

    @property
    def rows(self) -> int:
        """Return the rows that have not begun."""
        return self.source.rows - self.next

    def take(self, most: int) -> Segment:
        """Take the next ``most`` rows; all of them if ``most`` is 0 or the job's inputs share no first axis."""
        if self.whole or not most or self.source.rows < 0:
            self.restart(whole=self.whole)
            most = self.rows
        start, self.next = self.next, self.next + min(most, self.rows)
        return Segment(self.source, start, self.next)

    def restart(self, *, whole: bool) -> None:
        """Restart the job from its first row."""
        self.whole, self.next, self.parts = whole, 0, Parts(self.source)


class NextRun(NamedTuple):
    """The next run: its rows, and for each segment the ticket and the parts that its result belongs to."""

    run: Run
    tickets: tuple[JobTicket, ...]
    parts: tuple[Parts, ...]

    def without(self, unwanted: Collection[JobTicket]) -> NextRun:
        """Return the run without the rows of some jobs."""
        kept = [place for place, ticket in enumerate(self.tickets) if ticket not in unwanted]
        run = Run(tuple([self.run.segments[place] for place in kept]), self.run.batched)
        return NextRun(
            run, tuple([self.tickets[place] for place in kept]), tuple([self.parts[place] for place in kept])
        )


class _Level:
    """Jobs of one level in groups that can share a run, the group with the oldest job first."""

    def __init__(self) -> None:
        self._groups: dict[Key, deque[JobTicket]] = {}
        self._heads: list[tuple[int, Key]] = []
        self._orders: dict[JobTicket, int] = {}
        self._last = 0
        self._first = 0

    def __len__(self) -> int:
        return len(self._orders)

    def add(self, ticket: JobTicket) -> None:
        self._last += 1
        self._put(ticket, self._last)

    def add_first(self, ticket: JobTicket) -> None:
        """Add a job before all others; it shares no run."""
        self._first -= 1
        ticket.alone = True
        self._put(ticket, self._first)

    def _put(self, ticket: JobTicket, order: int) -> None:
        self._orders[ticket] = order
        key: Key = ("alone", order) if ticket.alone or ticket.source.rows < 0 else key_of(ticket.job)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = deque()
            heapq.heappush(self._heads, (order, key))
        group.append(ticket)

    def first(self) -> deque[JobTicket]:
        """Return the group that runs next."""
        return self._groups[self._heads[0][1]]

    def take(self, most: int) -> NextRun:
        _, key = self._heads[0]
        group = self._groups[key]
        taken = [group[0]]
        segments = [group[0].take(most)]
        batched = bool(most) and not group[0].whole and group[0].source.rows >= 0
        if group[0].rows <= 0:
            del self._orders[group.popleft()]
            rows = segments[0].stop - segments[0].start
            while batched and group and rows + group[0].rows <= most:
                ticket = group.popleft()
                del self._orders[ticket]
                rows += ticket.rows
                taken.append(ticket)
                segments.append(ticket.take(most))
        if group:
            heapq.heapreplace(self._heads, (self._orders[group[0]], key))
        else:
            heapq.heappop(self._heads)
            del self._groups[key]
        return NextRun(Run(tuple(segments), batched), tuple(taken), tuple([ticket.parts for ticket in taken]))

    def remove(self, unwanted: Callable[[JobTicket], bool]) -> list[JobTicket]:
        gone = [ticket for ticket in self._orders if unwanted(ticket)]
        for ticket in gone:
            del self._orders[ticket]
        if gone:
            left = {key: deque(one for one in group if one in self._orders) for key, group in self._groups.items()}
            self._groups = {key: group for key, group in left.items() if group}
            self._heads = [(self._orders[group[0]], key) for key, group in self._groups.items()]
            heapq.heapify(self._heads)
        return gone


class RunQueue:
    """Selects runs in strict order of levels, except that a level without a run for ``patience_s`` goes next.

    So no level starves: under load each level with jobs gets a run every ``patience_s`` seconds. 0: strict
    order always.
    """

    def __init__(self, patience_s: float, now: float) -> None:
        self._patience_s = patience_s
        self._levels = [_Level() for _ in range(LEVELS)]
        self._served = [now] * LEVELS
        """When each level last had a run or no jobs."""

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def add(self, ticket: JobTicket) -> None:
        self._levels[level_of(ticket.bundle.delivery.lane)].add(ticket)

    def has(self, level: int) -> bool:
        return len(self._levels[level]) > 0

    def jobs_ahead(self, level: int) -> int:
        """Return the number of queued jobs that run before the next one of this level."""
        return sum([len(one) for one in self._levels[: level + 1]])

    def order(self, now: float) -> list[int]:
        """Return the levels in the order to serve them: overdue ones first, longest wait first."""
        late = [level for level in range(LEVELS) if 0 < self._patience_s < now - self._served[level]]
        late.sort(key=lambda level: self._served[level])
        return late + [level for level in range(LEVELS) if level not in late]

    def mark_served(self, level: int, now: float) -> None:
        """Record that a level has a run now, or that no job of it waits anywhere."""
        self._served[level] = now

    def candidates(self, level: int) -> Sequence[JobTicket]:
        """Return the jobs that could share the next run of a level with jobs, oldest first."""
        return self._levels[level].first()

    def take(self, level: int, most: int, now: float) -> NextRun:
        """Take the next run of a level: the oldest job, and others of its shape within ``most`` rows.

        A job with more rows gives ``most`` of them. 0: one job as it is.
        """
        self.mark_served(level, now)
        return self._levels[level].take(most)

    def requeue_whole(self, ticket: JobTicket) -> None:
        """Run a job whole and alone, before the others of its level; results of its segments are discarded."""
        level = self._levels[level_of(ticket.bundle.delivery.lane)]
        level.remove(lambda other: other is ticket)
        ticket.restart(whole=True)
        level.add_first(ticket)

    def remove(self, unwanted: Callable[[JobTicket], bool]) -> list[JobTicket]:
        """Remove jobs; return those that were still queued."""
        return [gone for level in self._levels for gone in level.remove(unwanted)]

    def drop(self, jobs: Collection[str]) -> list[JobTicket]:
        """Remove jobs by id, as :meth:`remove` does."""
        return self.remove(lambda ticket: ticket.job.id in jobs)


def bundles_of(tickets: Iterable[JobTicket]) -> list[Bundle]:
    """Return the bundles of tickets, each once, in order."""
    return list(dict.fromkeys([ticket.bundle for ticket in tickets]))
