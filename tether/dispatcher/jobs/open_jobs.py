"""Which durable jobs were accepted and have not ended, as far as the dispatcher knows: for the sweeper.

Records are read in the order in which they were stored, each once. That a job has ended is heard from the results stream, which
publishes the headers of every stored result again (``republish``), without its outputs. What is not heard makes a job look open
for longer, and nothing worse: before anything is done with it, its result is asked for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import body_of
from tether.domain.job import SHARED, JobId, JobRecord
from tether.errors import BadEncoding, EnvelopeError
from tether.streams.lane_admin import stream_pages
from tether.streams.layout import pools_with_streams
from tether.wire import codec

MOST = 500_000
"""Open jobs that are remembered, at about 300 bytes each; records beyond them are read when some of these have ended."""

_BATCH = 512


class OpenJob(NamedTuple):
    """A record: its key in the bucket, its job, and when it was first seen, in this process's monotonic seconds."""

    key: str
    job: JobId
    since: float


class OpenRecords:
    """The records of open jobs, oldest first."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = KvBucket(bus, "jobs")
        self._open: dict[JobId, OpenJob] = {}
        self._jobs: dict[str, JobId] = {}
        """By the keys of their records."""
        self._read = 0
        """The sequence of the last record that was read."""
        self._early: tuple[set[str], set[str]] = (set(), set())
        """Jobs that ended before their record was read: during this read and the one before."""

    def __len__(self) -> int:
        return len(self._open)

    def begin_anew(self) -> None:
        """Forget everything: the broker may have lost records, and results that were heard of."""
        self._open.clear()
        self._jobs.clear()
        self._read = 0

    def ended(self, job: JobId) -> None:
        """A result of this job was stored."""
        if not self.take(job):
            self._early[1].add(job)

    def take(self, job: JobId) -> bool:
        """Remember a job no more; False when it was not remembered: it has ended meanwhile."""
        entry = self._open.pop(job, None)
        if entry is None:
            return False
        if self._jobs.get(entry.key) == job:
            del self._jobs[entry.key]
        return True

    async def read(self) -> None:
        """Take in the records that were stored since the last call; the first time all of them.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        over = _Ids() if self._read else await self._all_ended()
        now = self._bus.clock.monotonic()
        subjects, root = self._records.subject(">"), len(self._records.subject(""))
        async for item in self._bus.direct_scan(self._records.stream, subjects, start=self._read + 1, batch=_BATCH):
            if len(self._open) >= MOST:
                break
            self._read = item.sequence
            key = item.subject[root:]
            # what is written again begins again
            self.take(self._jobs.get(key, JobId("")))
            record = decoded(item.data)
            if record is None or record.id in over or record.id in self._early[0] or record.id in self._early[1]:
                continue
            self._open[record.id] = OpenJob(key, record.id, now)
            self._jobs[key] = record.id
        self._early = (self._early[1], set())

    async def _all_ended(self) -> _Ids:
        """Every job that has a result, without reading one."""
        names = self._bus.names
        found: list[int] = []
        for pool in (SHARED, *sorted(await pools_with_streams(self._bus))):
            async for page in stream_pages(self._bus, names.pool_results_stream(pool), names.results(pool)):
                found += [number for subject in page.waiting if (number := _number(subject.rpartition(".")[2])) >= 0]
        return _Ids(array("Q", sorted(found)))

    def older_than(self, age_s: float) -> Iterator[OpenJob]:
        """Jobs that were first seen at least so long ago."""
        limit = self._bus.clock.monotonic() - age_s
        for entry in self._open.values():
            if entry.since > limit:
                return
            yield entry


def decoded(frame: bytes) -> JobRecord | None:
    """A record to look for, unverified; None for what is none, and for the empty entry of one that was removed."""
    try:
        return codec.decode_record(body_of(frame)) if frame else None
    except (BadEncoding, EnvelopeError):
        return None


class _Ids:
    """Very many job ids in little memory: the last 64 bits of each, which no two jobs have in common."""

    def __init__(self, numbers: array[int] | None = None) -> None:
        self._numbers = array("Q") if numbers is None else numbers

    def __contains__(self, job: str) -> bool:
        number = _number(job)
        at = bisect_left(self._numbers, number)
        return number >= 0 and at < len(self._numbers) and self._numbers[at] == number


def _number(job: str) -> int:
    """-1 for what is no job id."""
    try:
        return int(job[-16:], 16)
    except ValueError:
        return -1
