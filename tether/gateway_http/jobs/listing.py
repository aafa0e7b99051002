"""Lists the jobs of one tenant, newest first, in pages.

All tenants share one stream of records; each record's subject begins with a mark of its tenant, so the broker
filters by tenant. Records are read backwards in windows of sequences; a window grows while it has few
records. A cursor is the time at which the broker stored the last job of its page: it reveals nothing of other
jobs, and stays valid after that job is deleted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from tether.bus.bus import Bus, StoredMessage
from tether.domain.job import JobId, JobRecord
from tether.errors import InvalidRequest
from tether.gateway_http.jobs.output_budget import AT_ONCE, OutputRoom
from tether.gateway_http.jobs.records import JobRecordStore
from tether.gateway_http.jobs.view import JobSnapshot, view

_WINDOW = 512
_GROWTH = 8
_MAX_RECORDS = 10_240
"""Records read for one page at most."""

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,9})?Z")

Page = tuple[list[dict[str, Any]], str | None]

Sees = Callable[[str], bool]
"""Return True if the caller may use a model of this name."""

States = Callable[[Sequence[JobRecord], OutputRoom], Awaitable[dict[JobId, JobSnapshot]]]


class ListQuery(NamedTuple):
    """``before``: the broker's timestamp of the last job on the previous page; empty for the first page."""

    tenant: str
    state: str
    wanted: Sees
    limit: int
    before: str = ""


def before(cursor: str) -> str:
    """Return the time in a cursor.

    Raises:
        InvalidRequest: it is not a cursor.
    """
    try:
        time = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        time = "-"
    if time and _TIME.fullmatch(time) is None:
        raise InvalidRequest(
            "query parameter 'cursor' is not the next_cursor of an earlier response; "
            "omit it to start from the newest job",
            field="cursor",
        )
    return time


def _cursor(item: StoredMessage) -> str:
    return base64.urlsafe_b64encode(item.headers["Nats-Time-Stamp"].encode()).decode().rstrip("=")


class JobList:
    """Job lists of one gateway. ``states`` returns the snapshots of jobs."""

    def __init__(self, bus: Bus, records: JobRecordStore, states: States) -> None:
        self._bus = bus
        self._records = records
        self._states = states
        self._stream = records.raw.stream

    async def page(self, asked: ListQuery) -> Page:
        """Return the next jobs, and the cursor of the page after them (None: no more).

        Raises:
            BrokerUnavailable: no answer.
        """
        found: list[dict[str, Any]] = []
        room = OutputRoom()
        for subjects in (self._records.subjects_of(asked.tenant), self._records.subjects_of_before):
            cursor = await self._add(found, asked, subjects, room)
            if cursor is not None:
                return found, cursor
        return found, None

    async def _add(self, found: list[dict[str, Any]], asked: ListQuery, subjects: str, room: OutputRoom) -> str | None:
        """Add matching jobs; return the cursor to continue from, or None if there are no more."""
        upper, first = await self._bounds(subjects, asked.before)
        size, left = _WINDOW, _MAX_RECORDS
        while upper >= first:
            lower = max(first, upper - size + 1)
            items = await self._window(subjects, lower, upper)
            if items is None:
                size = max(_WINDOW, size // _GROWTH)
                continue
            async with aclosing(self._shown(items, asked, room)) as shown:
                async for item, job in shown:
                    found.append(job)
                    if len(found) == asked.limit:
                        return _cursor(item)
            left -= len(items)
            if left <= 0:
                return _cursor(items[0])
            size = size * _GROWTH if len(items) < _WINDOW // _GROWTH else size
            upper = lower - 1
        return None

    async def _bounds(self, subjects: str, time: str) -> tuple[int, int]:
        """Return the last and the first sequence to read; the last is smaller if there is nothing."""
        oldest = await self._bus.direct_page(self._stream, subjects, start=1, batch=1, max_bytes=1)
        if not oldest:
            return 0, 1
        since = await self._bus.direct_since(self._stream, subjects, time) if time else 0
        upper = since - 1 if since else await self._bus.direct_last(self._stream, subjects)
        return upper, oldest[0].sequence

    async def _window(self, subjects: str, lower: int, upper: int) -> list[StoredMessage] | None:
        """Return the records between two sequences; None if there are too many to read at once."""
        items: list[StoredMessage] = []
        async for item in self._bus.direct_scan(self._stream, subjects, start=lower, batch=_WINDOW):
            if item.sequence > upper:
                break
            items.append(item)
            if len(items) > 2 * _WINDOW:
                return None
        return items

    async def _shown(
        self, items: Sequence[StoredMessage], asked: ListQuery, room: OutputRoom
    ) -> AsyncGenerator[tuple[StoredMessage, dict[str, Any]], None]:
        """Yield the matching jobs, newest first; give other requests a turn after every few."""
        newest = list(reversed(items))
        for start in range(0, len(newest), AT_ONCE):
            opened = [(item, self._records.opened(item.subject, item.data)) for item in newest[start : start + AT_ONCE]]
            rows = [(item, record) for item, record in opened if record is not None and _is_asked(record, asked)]
            states = await self._states([record for _, record in rows], room)
            for item, record in rows:
                job = view(states[record.id])
                if asked.state in ("", job["state"]):
                    yield item, job
            await asyncio.sleep(0)


def _is_asked(record: JobRecord, asked: ListQuery) -> bool:
    return record.tenant == asked.tenant and bool(record.bundle) and asked.wanted(record.model)
