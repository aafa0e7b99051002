"""Lists and removes lanes in the broker, for the dispatcher to find orphaned and broken ones."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.domain.job import Lane
from tether.settings import Settings
from tether.streams.layout import STREAM_NOT_FOUND, lane_config, pools_with_streams

CONSUMER_NOT_FOUND = 10014
MESSAGE_NOT_FOUND = 10037


class StreamState(msgspec.Struct, frozen=True):
    """State of a lane stream.

    ``created`` changes when the stream is recreated; ``last`` is a sequence; ``waiting`` is the number of
    messages on each subject that has any.
    """

    created: str
    consumers: int
    last: int
    waiting: dict[str, int]


class ConsumerState(msgspec.Struct, frozen=True):
    """State of a lane's consumer, as counted by the broker.

    ``delivered`` is the last delivered sequence of the stream; every message up to ``acked`` is acknowledged.
    """

    name: str
    delivered: int
    acked: int
    pending: int
    """Messages not delivered yet."""
    unacked: int
    """Messages delivered and not acknowledged."""


class LaneMessage(msgspec.Struct, frozen=True):
    """A bundle in a lane; ``id`` is its message id, which the records of its jobs name."""

    sequence: int
    subject: str
    id: str


async def lanes_there(bus: Bus) -> set[Lane]:
    """Return every lane that has a consumer or a message.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    found = [await consumers_of(bus, stream) for stream in await lane_streams(bus)]
    return set[Lane]().union(*found) | await lanes_with_messages(bus)


async def lanes_with_messages(bus: Bus) -> set[Lane]:
    """Return every lane with a message that is not acknowledged, delivered or not.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    found = [await waiting_in(bus, stream) for stream in await lane_streams(bus)]
    return set[Lane]().union(*found)


async def consumers_of(bus: Bus, stream: str) -> set[Lane]:
    """Return the lanes that have a consumer on a stream; none if the stream does not exist.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    found = [bus.names.parse_lane_consumer(name) async for name in _consumers(bus, stream)]
    return {lane for lane in found if lane is not None}


async def waiting_in(bus: Bus, stream: str) -> set[Lane]:
    """Return what :func:`lanes_with_messages` does for one stream.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    state = await stream_state(bus, stream)
    found = [bus.names.parse_lane(subject) for subject in (state.waiting if state is not None else ())]
    return {lane for lane in found if lane is not None}


async def lane_streams(bus: Bus) -> list[str]:
    """Return every stream with lanes, including those of tenants that are or were isolated.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    names = bus.names
    streams = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    streams += [names.jobs_stream(shard) for shard in range(names.job_shards)]
    for pool in sorted(await pools_with_streams(bus)):
        streams += [names.pool_infer_stream(pool), names.pool_jobs_stream(pool)]
    return streams


async def _consumers(bus: Bus, stream: str) -> AsyncIterator[str]:
    seen, total = 0, 1
    while seen < total:
        answer = await _asked(bus, f"CONSUMER.NAMES.{stream}", {"offset": seen})
        names = answer.get("consumers") or []
        for name in names:
            yield name
        seen, total = seen + len(names), int(answer.get("total", 0)) if names else 0


async def stream_state(bus: Bus, stream: str, subjects: str = ">") -> StreamState | None:
    """Return the state of a stream with the messages on ``subjects``; None if it does not exist.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    waiting: dict[str, int] = {}
    found: StreamState | None = None
    async for page in stream_pages(bus, stream, subjects):
        waiting |= page.waiting
        found = msgspec.structs.replace(page, waiting=waiting)
    return found


async def stream_pages(bus: Bus, stream: str, subjects: str) -> AsyncIterator[StreamState]:
    """Yield :func:`stream_state` in pages of at most 100,000 subjects, to limit memory.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    seen, total = 0, 1
    while seen < total:
        answer = await _asked(bus, f"STREAM.INFO.{stream}", {"subjects_filter": subjects, "offset": seen})
        if not answer:
            return
        state = answer["state"]
        page: dict[str, int] = state.get("subjects") or {}
        yield StreamState(answer["created"], int(state["consumer_count"]), int(state["last_seq"]), page)
        seen, total = seen + len(page), int(answer.get("total", 0)) if page else 0


async def consumer_states(bus: Bus, stream: str) -> list[ConsumerState]:
    """Return every consumer of a stream, in requests of 256; costly for a stream with many.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    return [_consumer(item) async for item in _descriptions(bus, stream)]


async def configured_lanes(bus: Bus, stream: str, settings: Settings) -> set[Lane]:
    """Return the lanes configured as ``settings``; one list is 50 times as fast as a request each.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    found: set[Lane] = set()
    async for item in _descriptions(bus, stream):
        lane, has = bus.names.parse_lane_consumer(item["name"]), item["config"]
        if lane is not None:
            wanted = lane_config(bus.names, lane, settings)
            if all(has.get(key) == value for key, value in wanted.items()):
                found.add(lane)
    return found


async def _descriptions(bus: Bus, stream: str) -> AsyncIterator[dict[str, Any]]:
    seen, total = 0, 1
    while seen < total:
        answer = await _asked(bus, f"CONSUMER.LIST.{stream}", {"offset": seen})
        page = answer.get("consumers") or ()
        for item in page:
            yield item
        seen, total = seen + len(page), int(answer.get("total", 0)) if page else 0


async def consumer_state(bus: Bus, lane: Lane) -> ConsumerState | None:
    """Return a lane's consumer; None if it has none.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    answer = await _asked(bus, f"CONSUMER.INFO.{bus.names.lane_stream(lane)}.{bus.names.lane_consumer(lane)}", None)
    return _consumer(answer) if answer else None


async def next_message(bus: Bus, stream: str, subject: str, start: int) -> LaneMessage | None:
    """Return the first message on ``subject`` (wildcards allowed) from sequence ``start`` on, or None.

    The stream's leader answers, so a missing message does not exist.

    Raises:
        JetStreamError, BrokerUnavailable: also if the stream does not exist.
    """
    return await _message(bus, stream, {"seq": start, "next_by_subj": subject})


async def message_at(bus: Bus, stream: str, sequence: int) -> LaneMessage | None:
    """Return the message with a sequence, as :func:`next_message` does."""
    return await _message(bus, stream, {"seq": sequence})


async def _message(bus: Bus, stream: str, request: dict[str, Any]) -> LaneMessage | None:
    try:
        message = (await bus.api(f"STREAM.MSG.GET.{stream}", request))["message"]
    except JetStreamError as error:
        if error.err_code != MESSAGE_NOT_FOUND:
            raise
        return None
    lines = base64.b64decode(message.get("hdrs", "")).decode(errors="replace").split("\r\n")
    found = [value.strip() for name, _, value in (line.partition(":") for line in lines) if name == "Nats-Msg-Id"]
    return LaneMessage(int(message["seq"]), message["subject"], found[0] if found else "")


def _consumer(item: dict[str, Any]) -> ConsumerState:
    return ConsumerState(
        item["name"],
        int(item["delivered"]["stream_seq"]),
        int(item["ack_floor"]["stream_seq"]),
        int(item["num_pending"]),
        int(item["num_ack_pending"]),
    )


async def _asked(bus: Bus, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Request the state of a stream or consumer; an empty response means it does not exist."""
    try:
        # in a cluster a list waits for servers that are down
        return await bus.api(path, body, timeout=5.0 if path.startswith("CONSUMER.LIST.") else 2.0)
    except JetStreamError as error:
        if error.err_code not in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
            raise
        return {}


async def remove_lane(bus: Bus, lane: Lane) -> None:
    """Remove a lane's consumer; idempotent. Messages stay.

    Raises:
        JetStreamError, BrokerUnavailable: the consumer may still exist.
    """
    try:
        await bus.api(f"CONSUMER.DELETE.{bus.names.lane_stream(lane)}.{bus.names.lane_consumer(lane)}")
    except JetStreamError as error:
        if error.err_code not in (CONSUMER_NOT_FOUND, STREAM_NOT_FOUND):
            raise
