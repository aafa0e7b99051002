"""Tracks accepted durable jobs that have not finished, for the sweeper.

Records are read once each, in the order in which they were stored. Finished jobs are known from the results
stream, which republishes the headers of every stored result (``republish``) without its outputs. A missed
message makes a job look open for longer, and nothing worse: its result is read before anything is done with
it.
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
"""Maximum open jobs to remember, at about 300 bytes each; more records are read when some have finished."""

_BATCH = 512


class OpenJob(NamedTuple):
    """A job record: its key, its job, and when it was first seen, in monotonic seconds."""

    key: str
    job: JobId
    since: float


class OpenRecords:
    """Records of open jobs, oldest first."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = KvBucket(bus, "jobs")
        self._open: dict[JobId, OpenJob] = {}
        self._jobs: dict[str, JobId] = {}
        """Jobs by the keys of their records."""
        self._read = 0
        """Sequence of the last record read."""
        self._early: tuple[set[str], set[str]] = (set(), set())
        """Jobs that finished before their record was read, during this read and the one before."""

    def __len__(self) -> int:
        return len(self._open)

    def reset(self) -> None:
        """Forget everything: the broker may have lost records and results."""
        self._open.clear()
        self._jobs.clear()
        self._read = 0

    def ended(self, job: JobId) -> None:
        """Record that a result of a job was stored."""
        if not self.take(job):
            self._early[1].add(job)

    def take(self, job: JobId) -> bool:
        """Forget a job. Return False if it was not tracked: it has finished meanwhile."""
        entry = self._open.pop(job, None)
        if entry is None:
            return False
        if self._jobs.get(entry.key) == job:
            del self._jobs[entry.key]
        return True

    async def read(self) -> None:
        """Read the records stored since the last call; all of them on the first call.

        Raises:
            JetStreamError, BrokerUnavailable: the records could not be read.
        """
        over = _Ids() if self._read else await self._all_ended()
        now = self._bus.clock.monotonic()
        subjects, root = self._records.subject(">"), len(self._records.subject(""))
        async for item in self._bus.direct_scan(self._records.stream, subjects, start=self._read + 1, batch=_BATCH):
            if len(self._open) >= MOST:
                break
            self._read = item.sequence
            key = item.subject[root:]
            # a rewritten record counts as new
            self.take(self._jobs.get(key, JobId("")))
            record = decoded(item.data)
            if record is None or record.id in over or record.id in self._early[0] or record.id in self._early[1]:
                continue
            self._open[record.id] = OpenJob(key, record.id, now)
            self._jobs[key] = record.id
        self._early = (self._early[1], set())

    async def _all_ended(self) -> _Ids:
        """Return the ids of all jobs that have a result, without reading results."""
        names = self._bus.names
        found: list[int] = []
        for pool in (SHARED, *sorted(await pools_with_streams(self._bus))):
            async for page in stream_pages(self._bus, names.pool_results_stream(pool), names.results(pool)):
                found += [number for subject in page.waiting if (number := _number(subject.rpartition(".")[2])) >= 0]
        return _Ids(array("Q", sorted(found)))

    def older_than(self, age_s: float) -> Iterator[OpenJob]:
        """Yield the jobs first seen at least ``age_s`` seconds ago."""
        limit = self._bus.clock.monotonic() - age_s
        for entry in self._open.values():
            if entry.since > limit:
                return
            yield entry


def decoded(frame: bytes) -> JobRecord | None:
    """Decode a record without verification; None if it is invalid, or empty because it was removed."""
    try:
        return codec.decode_record(body_of(frame)) if frame else None
    except (BadEncoding, EnvelopeError):
        return None


class _Ids:
    """A compact set of job ids: the last 64 bits of each, which are unique."""

    def __init__(self, numbers: array[int] | None = None) -> None:
        self._numbers = array("Q") if numbers is None else numbers

    def __contains__(self, job: str) -> bool:
        number = _number(job)
        at = bisect_left(self._numbers, number)
        return number >= 0 and at < len(self._numbers) and self._numbers[at] == number


def _number(job: str) -> int:
    """Return the last 64 bits of a job id; -1 if it is not one."""
    try:
        return int(job[-16:], 16)
    except ValueError:
        return -1
