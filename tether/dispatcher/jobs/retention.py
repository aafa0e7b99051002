"""Deletes finished durable jobs ``result_ttl_s`` after their end, earlier when space is short.

A job's record is deleted before its result, so that a finished job never looks open. The results stream is in
the order in which jobs finished, so it is deleted from its start; records of open jobs are kept. All state is
in the broker: several dispatchers may run this, and a crash leaves nothing half done.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tether.bus.bus import Bus, StoredMessage
from tether.bus.errors import JetStreamError
from tether.bus.key_value.bucket import KvBucket
from tether.dispatcher.jobs.open_jobs import decoded
from tether.domain.job import SHARED, older_record_keys, record_key
from tether.errors import TetherError
from tether.process import metrics
from tether.process.log_rate_limiter import LogRateLimiter
from tether.streams.layout import pools_with_streams
from tether.streams.usage import StreamUse, stream_use

log = logging.getLogger(__name__)

ROUND_S = 1.0
HIGH = 0.8
"""Fraction of a store's limit at which the oldest finished jobs are deleted."""

LOW = 0.7
"""Fraction of its limit to which a store is reduced."""

KEPT = 0.125
"""Fraction of the records' limit reserved for finished jobs, however many jobs are open."""

_PAGE = 512
_PAGE_BYTES = 4 << 20
_PAGES = 64
"""Maximum pages of one pool in one round."""

_AT_ONCE = 128
_DELETE_FAILED = 10057
_NOT_THERE = "no message found"
_TOLD_S = 600.0


@dataclass
class _Walk:
    """Progress through a pool's results when making space; results before it were spared."""

    at: int = 0
    spares: bool = True
    """Whether modest tenants are spared: until one pass to the end has not freed enough."""


@dataclass
class _Wanted:
    """Bytes still to be freed."""

    records: float
    results: float

    @property
    def met(self) -> bool:
        return self.records <= 0 and self.results <= 0

    def enough(self, ends: Sequence[StoredMessage], records: dict[str, StoredMessage]) -> list[StoredMessage]:
        """Return the first results that free enough, or all of them."""
        taken: list[StoredMessage] = []
        for item in ends:
            if self.met:
                break
            record = records.get(_job_of(item))
            self.results -= len(item.data)
            self.records -= 0 if record is None else len(record.data)
            taken.append(item)
        return taken


class Retention:
    """Deletes finished jobs; runs in the dispatcher."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records = KvBucket(bus, "jobs")
        self._walks: dict[str, _Walk] = {}
        self._making_room = False
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=_TOLD_S)

    async def run(self) -> None:
        """Run a round periodically until cancelled."""
        while True:
            try:
                await self.round()
            except TetherError as error:
                log.info(
                    "could not delete finished jobs: %s",
                    error,
                    extra={"action": "retention_failed", "code": error.code},
                )
            await asyncio.sleep(ROUND_S)

    async def round(self) -> None:
        """Delete jobs that are old enough, and more if space is short.

        Raises:
            JetStreamError, BrokerUnavailable: the round is incomplete.
        """
        uses: dict[str, StreamUse] = {}
        for pool in await self._pools():
            if (use := await stream_use(self._bus, self._bus.names.pool_results_stream(pool))) is not None:
                uses[pool] = use
        limit = self._bus.clock.utc() - self._bus.settings.result_ttl_s
        for pool in [pool for pool, use in uses.items() if use.since <= limit]:
            await self._forget_old(pool, limit)
        records = await stream_use(self._bus, self._records.stream)
        if records is not None:
            await self._make_room(records, uses)

    async def _pools(self) -> list[str]:
        """Return the pools whose results this dispatcher may read: those with a worker bound to them."""
        bound = {record.tenant for record in self._bus.verifier.keyset.identities}
        return [SHARED, *sorted(await pools_with_streams(self._bus) & bound)]

    # by age

    async def _forget_old(self, pool: str, limit: float) -> None:
        for _ in range(_PAGES):
            page = await self._page(pool, 1)
            old = [item for item in page if item.stored_at <= limit]
            await self._delete_jobs(pool, old, await self._records_of(old), "age")
            if not old or len(old) < len(page):
                return

    # for space

    async def _make_room(self, records: StreamUse, results: dict[str, StreamUse]) -> None:
        """Free space in the records, which all pools share, from the pool with the most results."""
        for store, use in (("records", records), ("results", results.get(SHARED))):
            metrics.JOB_STORE_USED.labels(store).set(0.0 if use is None else use.share)
        share = LOW if self._making_room else HIGH
        tight = [pool for pool, use in results.items() if use.share > share]
        if records.share > share and results:
            tight.append(max(results, key=lambda pool: results[pool].messages))
        self._making_room = bool(tight)
        for pool in set(tight):
            await self._shrink(pool)
        for pool in self._walks.keys() - set(tight):
            del self._walks[pool]

    async def _shrink(self, pool: str) -> None:
        """Continue where the last round ended, until both stores are small enough."""
        walk = self._walks.setdefault(pool, _Walk())
        stream = self._bus.names.pool_results_stream(pool)
        for _ in range(_PAGES):
            records, results = await stream_use(self._bus, self._records.stream), await stream_use(self._bus, stream)
            wanted = _Wanted(_records_above(records, results), _above(results))
            if wanted.met:
                return
            page = await self._page(pool, walk.at + 1)
            if not page:
                walk.at, walk.spares = 0, False
                return
            found = await self._records_of(page)
            going = wanted.enough(_without_modest(page, found) if walk.spares else page, found)
            await self._delete_jobs(pool, going, found, "room")
            walk.at = going[-1].sequence if wanted.met else page[-1].sequence

    # both

    async def _page(self, pool: str, start: int) -> list[StoredMessage]:
        names = self._bus.names
        stream, subjects = names.pool_results_stream(pool), names.results(pool)
        return await self._bus.direct_page(stream, subjects, start=start, batch=_PAGE, max_bytes=_PAGE_BYTES)

    async def _records_of(self, ends: Sequence[StoredMessage]) -> dict[str, StoredMessage]:
        """Return the records of finished jobs by job id."""
        jobs = [_job_of(item) for item in ends]
        found = _by_job(await self._read({record_key(job) for job in jobs}))
        if older := {job for job in jobs if job not in found}:
            found |= _by_job(await self._read({key for job in older for key in older_record_keys(job)}))
        return found

    async def _read(self, keys: set[str]) -> Iterable[StoredMessage]:
        return (
            await self._bus.direct_batch(self._records.stream, [self._records.subject(key) for key in keys])
        ).values()

    async def _delete_jobs(
        self, pool: str, ends: Sequence[StoredMessage], records: dict[str, StoredMessage], reason: str
    ) -> None:
        """Delete records first: a job without its result but with its record would look open."""
        if not ends:
            return
        jobs = [_job_of(item) for item in ends]
        await _some_at_a_time([self._drop_record(records[job]) for job in jobs if job in records])
        stream = self._bus.names.pool_results_stream(pool)
        await _some_at_a_time([self._drop_result(stream, item.sequence) for item in ends])
        metrics.JOBS_FORGOTTEN.labels(reason).inc(len(ends))
        if reason == "room" and self._told.passes(pool) is not None:
            log.warning(
                "deleting finished jobs before result_ttl_s: raise max_file_mb, or lower result_ttl_s",
                extra={"action": "jobs_forgotten_early"},
            )

    async def _drop_record(self, record: StoredMessage) -> None:
        """Delete a record unless another job has replaced it."""
        await self._records.remove(record.subject[len(self._records.subject("")) :], record.sequence)

    async def _drop_result(self, stream: str, sequence: int) -> None:
        try:
            await self._bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True})
        except JetStreamError as error:
            if error.err_code != _DELETE_FAILED or _NOT_THERE not in error.message:
                raise


def _above(use: StreamUse | None) -> float:
    """Return the bytes of a stream above its target."""
    return 0.0 if use is None or use.most <= 0 else use.bytes - LOW * use.most


def _records_above(records: StreamUse | None, ends: StreamUse | None) -> float:
    """Return the bytes of records above their target, excluding the fraction reserved for finished jobs."""
    if records is None or ends is None or not records.messages:
        return 0.0
    ended = records.bytes * min(1.0, ends.messages / records.messages)
    return min(_above(records), ended - KEPT * records.most)


def _job_of(end: StoredMessage) -> str:
    return end.subject.rpartition(".")[2]


def _by_job(stored: Iterable[StoredMessage]) -> dict[str, StoredMessage]:
    opened = [(decoded(item.data), item) for item in stored]
    return {record.id: item for record, item in opened if record is not None}


def _without_modest(page: Sequence[StoredMessage], records: dict[str, StoredMessage]) -> list[StoredMessage]:
    """Return the results to delete first, sparing tenants with less than half of an equal share."""
    opened = {job: decoded(item.data) for job, item in records.items()}
    tenants = {job: record.tenant for job, record in opened.items() if record is not None}
    counts = Counter(tenants.values())
    share = len(tenants) / (2 * max(1, len(counts)))
    return [item for item in page if (tenant := tenants.get(_job_of(item))) is None or counts[tenant] >= share]


async def _some_at_a_time(steps: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all steps with limited concurrency; after the first error begin no more, then raise it."""
    for start in range(0, len(steps), _AT_ONCE):
        part = steps[start : start + _AT_ONCE]
        for result in await asyncio.gather(*part, return_exceptions=True):
            if isinstance(result, BaseException):
                for left in steps[start + _AT_ONCE :]:
                    left.close()
                raise result
