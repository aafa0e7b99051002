"""What is in the broker's lanes, whoever made them: for the dispatcher, which removes those that have no version any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from tether.bus.connection import Bus
from tether.bus.errors import JetStreamError
from tether.bus.topology import STREAM_NOT_FOUND, scopes_with_streams
from tether.job import Lane

CONSUMER_NOT_FOUND = 10014


async def lanes_there(bus: Bus) -> set[Lane]:
    """Every lane that has a consumer or a message.

    Raises:
        JetStreamError, BrokerUnavailable
    """
    streams = await _streams(bus)
    found = [bus.names.parse_lane_consumer(name) for stream in streams async for name in _consumers(bus, stream)]
    return {lane for lane in found if lane is not None} | await lanes_with_messages(bus)


async def lanes_with_messages(bus: Bus) -> set[Lane]:
    """Every lane in which a message waits or is in a worker's hands: it is gone when it is acknowledged.

    Raises:
        JetStreamError, BrokerUnavailable
    """
    streams = await _streams(bus)
    found = [bus.names.parse_lane(subject) for stream in streams async for subject in _subjects(bus, stream)]
    return {lane for lane in found if lane is not None}


async def _streams(bus: Bus) -> list[str]:
    names = bus.names
    streams = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    streams += [names.jobs_stream(shard) for shard in range(names.job_shards)]
    for scope in sorted(await scopes_with_streams(bus)):
        streams += [names.scope_infer_stream(scope), names.scope_jobs_stream(scope)]
    return streams


async def _consumers(bus: Bus, stream: str) -> AsyncIterator[str]:
    seen, total = 0, 1
    while seen < total:
        answer = await _asked(bus, f"CONSUMER.NAMES.{stream}", {"offset": seen})
        names = answer.get("consumers") or []
        for name in names:
            yield name
        seen, total = seen + len(names), int(answer.get("total", 0)) if names else 0


async def _subjects(bus: Bus, stream: str) -> AsyncIterator[str]:
    """The subjects that have a message."""
    seen, total = 0, 1
    while seen < total:
        answer = await _asked(bus, f"STREAM.INFO.{stream}", {"subjects_filter": ">", "offset": seen})
        subjects = answer.get("state", {}).get("subjects") or {}
        for subject in subjects:
            yield subject
        seen, total = seen + len(subjects), int(answer.get("total", 0)) if subjects else 0


async def _asked(bus: Bus, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An answer about a stream; an empty one when there is no such stream."""
    try:
        return await bus.api(path, body)
    except JetStreamError as error:
        if error.err_code != STREAM_NOT_FOUND:
            raise
        return {}


async def remove_lane(bus: Bus, lane: Lane) -> None:
    """Remove a lane's consumer; safe to repeat. Messages stay.

    Raises:
        JetStreamError, BrokerUnavailable
    """
    try:
        await bus.api(f"CONSUMER.DELETE.{bus.names.lane_stream(lane)}.{bus.names.lane_consumer(lane)}")
    except JetStreamError as error:
        if error.err_code not in (CONSUMER_NOT_FOUND, STREAM_NOT_FOUND):
            raise
