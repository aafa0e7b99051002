"""Configurations of streams, buckets and lane consumers. Only the dispatcher creates them.

Only the administrator's login changes an existing stream, see :mod:`tether.streams.updates`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.domain.job import LONGEST_DEADLINE_S, SHARED, Lane, LaneKind, Priority
from tether.errors import PermissionDenied, QueueFull, StorageFull, TetherError
from tether.process import metrics
from tether.settings import Settings
from tether.wire.subjects import BUCKETS, Names, pool_token

log = logging.getLogger(__name__)

NANOSECONDS = 1_000_000_000
MAX_CONSUMERS = 20_000
"""Maximum lanes of a stream; the server's default of 1,000 is too low."""

BOUNDED_BUCKETS = ("jobs", "attempts", "liveness", "puts")
"""Buckets that grow with clients' requests, and so have limits of their own."""

DUPLICATES_S = 30
"""Seconds in which an infer stream deduplicates message ids."""
JOBS, RESULTS, RECORDS, DEAD, NOTES = 8, 9, 6, 2, 1
"""Share of each store in 64ths of the disk. A small job takes about 570 bytes of records and 450 of results."""

ENDS = 1 / 16
"""Fraction of the results reserved for outcomes without outputs, when outputs have filled the rest."""

PUTS = 256
"""Fraction of the disk for notes of sent chunks (1/256), taken from ``attempts``; oldest notes are evicted."""

RESULT_MARGIN_S = 120
"""Seconds that a result is kept beyond the record of its job."""

STREAM_NOT_FOUND = 10059
PRIORITY_GROUP = "lane"
_JUST_MADE_S = 1.0
_MB = 1 << 20
_SIDE_BY_SIDE = 8


def streams(names: Names, settings: Settings) -> list[dict[str, Any]]:
    """Return the configuration of every stream and bucket, in JetStream API form."""
    memory = settings.max_memory_mb * _MB
    audit = _audit_mb(settings) * _MB
    disk = _rest(settings)
    infer = [_infer(names, shard, memory // (2 * names.infer_shards)) for shard in range(names.infer_shards)]
    jobs = [_jobs(names, shard, disk * JOBS // (64 * names.job_shards), settings) for shard in range(names.job_shards)]
    buckets = [_bucket(names, name, settings) for name in BUCKETS if name not in BOUNDED_BUCKETS]
    notes_ns = int(settings.result_ttl_s * NANOSECONDS)
    puts = disk // PUTS
    puts_ns = int(settings.unreferenced_ttl_s * NANOSECONDS)
    return [
        *infer,
        *jobs,
        _results(names, SHARED, disk * RESULTS // 64, settings),
        _dead(names, disk * DEAD // 64, settings),
        _audit(names, audit, settings),
        *buckets,
        _bucket(names, "jobs", settings, max_bytes=disk * RECORDS // 64, max_age=_longest_ns(settings)),
        _bucket(names, "attempts", settings, max_bytes=disk * NOTES // 64 - puts, max_age=notes_ns, discard="old"),
        _bucket(names, "liveness", settings, storage="memory", max_bytes=memory // 16, max_age=60 * NANOSECONDS),
        _bucket(names, "puts", settings, max_bytes=puts, max_age=puts_ns, discard="old"),
        *(_objects(names, bucket, settings) for bucket in names.chunk_buckets()),
    ]


def _audit_mb(settings: Settings) -> int:
    return settings.audit_max_mb or settings.max_file_mb // 16


def _rest(settings: Settings) -> int:
    """Return 16/15 of the disk bytes besides the audit log; the shares of all stores add up to 15/16 of it."""
    return (settings.max_file_mb - _audit_mb(settings)) * _MB * 16 // 15


def pool_streams(names: Names, pool: str, settings: Settings) -> list[dict[str, Any]]:
    """Return the streams of an isolated tenant; all of these share 1/4 of the memory and 1/8 of the disk."""
    memory = settings.max_memory_mb * _MB // 4 // settings.max_isolated_tenants
    disk = _rest(settings) // 16 // settings.max_isolated_tenants
    shard = pool_token(pool)
    return [
        # few lanes, and a name that no permission can list: it is not recreated but replicated
        _infer(names, shard, memory, replicas=settings.replicas),
        _jobs(names, shard, disk, settings),
        _results(names, pool, disk, settings),
    ]


def _infer(names: Names, shard: int | str, max_bytes: int, *, replicas: int = 1) -> dict[str, Any]:
    return {
        "name": names.infer_stream(shard),
        "subjects": [names.infer_subjects(shard)],
        "storage": "memory",
        "retention": "workqueue",
        "discard": "new",
        "max_bytes": max_bytes,
        "max_consumers": MAX_CONSUMERS,
        "allow_msg_ttl": True,
        "duplicate_window": DUPLICATES_S * NANOSECONDS,
        "num_replicas": replicas,
    }


def _jobs(names: Names, shard: int | str, max_bytes: int, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.jobs_stream(shard),
        "subjects": [names.jobs_subjects(shard)],
        "storage": "file",
        "retention": "workqueue",
        "discard": "new",
        "max_bytes": max_bytes,
        "max_consumers": MAX_CONSUMERS,
        # jobs have no such limit: a gateway's probes are not affected
        "allow_msg_ttl": True,
        "duplicate_window": 120 * NANOSECONDS,
        "num_replicas": settings.replicas,
    }


def _longest_ns(settings: Settings) -> int:
    """Return how long a job's record is kept without a dispatcher, if the job finishes last-minute."""
    return int((LONGEST_DEADLINE_S + settings.result_ttl_s) * NANOSECONDS)


def _results(names: Names, pool: str, max_bytes: int, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.pool_results_stream(pool),
        "subjects": [names.results(pool)],
        # the dispatcher counts open jobs with it
        "republish": {
            "src": names.results(pool),
            "dest": names.ended("{{wildcard(1)}}", pool),
            "headers_only": True,
        },
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "discard_new_per_subject": True,
        "max_msgs_per_subject": 1,
        # the dispatcher deletes them long before
        "max_age": _longest_ns(settings) + RESULT_MARGIN_S * NANOSECONDS,
        "max_bytes": max_bytes,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "num_replicas": settings.replicas,
    }


def _dead(names: Names, max_bytes: int, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.dead_stream,
        "subjects": [names.dead_subjects()],
        "storage": "file",
        "retention": "limits",
        # the newest are those that callers still ask for
        "discard": "old",
        "max_age": 30 * 86400 * NANOSECONDS,
        "max_bytes": max_bytes,
        "allow_direct": True,
        "num_replicas": settings.replicas,
    }


def _audit(names: Names, max_bytes: int, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.audit_stream,
        "subjects": [names.audit_subjects()],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_age": settings.audit_retention_days * 86400 * NANOSECONDS,
        "max_bytes": max_bytes,
        "compression": "s2",
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
        "duplicate_window": 120 * NANOSECONDS,
        "num_replicas": settings.replicas,
    }


def _bucket(
    names: Names,
    name: str,
    settings: Settings,
    *,
    storage: str = "file",
    max_bytes: int = -1,
    max_age: int = 0,
    discard: str = "new",
) -> dict[str, Any]:
    return {
        "name": names.bucket_stream(name),
        "subjects": [names.bucket_key(name, ">")],
        "storage": storage,
        "retention": "limits",
        "discard": discard,
        "max_msgs_per_subject": 1,
        "max_bytes": max_bytes,
        "max_age": max_age,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "allow_rollup_hdrs": False,
        "deny_delete": True,
        "num_replicas": settings.replicas,
    }


def _objects(names: Names, bucket: str, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.object_stream(bucket),
        "subjects": [names.object_chunk(bucket, ">"), names.object_meta(bucket, ">")],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_bytes": _rest(settings) * 3 // 8 // names.partitions,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "num_replicas": settings.chunk_replicas or settings.replicas,
    }


async def ensure_platform(bus: Bus, settings: Settings) -> None:
    """Create missing streams and update the rest; idempotent.

    Raises:
        JetStreamError: the server refuses a configuration (for example a limit that is too low).
        BrokerUnavailable: it does not answer.
        TetherError: in any case of the first stream that failed, after all others.
    """
    for error in (await ensure_streams(bus, streams(bus.names, settings))).values():
        raise error


async def ensure_streams(
    bus: Bus, configs: Sequence[dict[str, Any]], as_they_are: set[str] | None = None
) -> dict[str, TetherError]:
    """Create missing streams and update the rest, one by one; return the errors by stream.

    A stream that does not answer delays no other one. ``as_they_are``: streams that this identity may not
    change, which is no error; it is extended.
    """
    failed: dict[str, TetherError] = {}
    gate = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def ensure(config: dict[str, Any]) -> None:
        async with gate:
            try:
                await _ensure_stream(bus, config, as_they_are)
            except TetherError as error:
                failed[config["name"]] = error

    await asyncio.gather(*map(ensure, configs))
    # a stream that grows may need the space that another one frees
    for config in [config for config in configs if isinstance(failed.get(config["name"]), QueueFull | StorageFull)]:
        del failed[config["name"]]
        await ensure(config)
    return failed


async def ensure_pool(bus: Bus, pool: str, settings: Settings, as_they_are: set[str] | None = None) -> None:
    """Create and update the streams of one isolated tenant, as :func:`ensure_streams` does.

    Raises:
        QueueFull, StorageFull: the broker has no space for them.
        PermissionDenied: no worker is bound to the tenant, so this identity may not create them.
        JetStreamError, BrokerUnavailable: otherwise.
    """
    for error in (await ensure_streams(bus, pool_streams(bus.names, pool, settings), as_they_are)).values():
        raise error


async def pools_with_streams(bus: Bus) -> set[str]:
    """Return the tenants that have their own streams, also those that are no longer isolated."""
    found: set[str] = set()
    seen, total = 0, 1
    while seen < total:
        answer = await bus.api("STREAM.NAMES", {"subject": bus.names.every_job(), "offset": seen})
        names = answer.get("streams") or []
        found.update(pool for name in names if (pool := bus.names.stream_pool(name)) is not None)
        seen, total = seen + len(names), int(answer["total"]) if names else 0
    return found


async def is_empty(bus: Bus, pool: str) -> bool:
    """Return True if no job is pending or running in the lanes of an isolated tenant."""
    for stream in (bus.names.pool_infer_stream(pool), bus.names.pool_jobs_stream(pool)):
        try:
            info = await bus.api(f"STREAM.INFO.{stream}")
        except JetStreamError as error:
            if error.err_code != STREAM_NOT_FOUND:
                raise
            continue
        if info["state"]["messages"]:
            return False
    return True


async def compared_stream(bus: Bus, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a stream's configuration (empty if missing) and the fields that differ from ``config``.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    try:
        current: dict[str, Any] = (await bus.api(f"STREAM.INFO.{config['name']}"))["config"]
    except JetStreamError as error:
        if error.err_code != STREAM_NOT_FOUND:
            raise
        return {}, []
    return current, sorted(key for key, value in config.items() if current.get(key, _absent(value)) != value)


async def _ensure_stream(bus: Bus, config: dict[str, Any], as_they_are: set[str] | None) -> None:
    name = config["name"]
    current, changed = await compared_stream(bus, config)
    if not current:
        await bus.api(f"STREAM.CREATE.{name}", config)
        return
    if not changed or (as_they_are is not None and name in as_they_are):
        return
    fields = ", ".join(changed)
    try:
        await bus.api(f"STREAM.UPDATE.{name}", {**current, **config})
    except PermissionDenied:
        if as_they_are is None:
            raise
        as_they_are.add(name)
        log.warning(
            "stream %s was not changed, but %s should change; run 'tether streams --apply' with the admin's keys",
            name,
            fields,
            extra={"action": "stream_not_updated"},
        )
    else:
        log.info("stream %s: updated %s", name, fields, extra={"action": "stream_updated"})


def _absent(value: object) -> object:
    """Return the default of a field that the server leaves out."""
    return False if isinstance(value, bool) else 0 if isinstance(value, int) else None


def lanes_of(model: str, version: int, region: str, pool: str = SHARED) -> list[Lane]:
    """Return every lane of a version in a region and pool: the infer lane, and a jobs lane for each priority."""
    infer = Lane(LaneKind.INFER, model, version, region, pool)
    return [infer, *(Lane(LaneKind.JOB, model, version, region, pool, level) for level in Priority)]


def lane_config(names: Names, lane: Lane, settings: Settings) -> dict[str, Any]:
    """Return the configuration of a lane's durable pull consumer, in JetStream API form."""
    name = names.lane_consumer(lane)
    wait = settings.infer_ack_wait_s if lane.kind is LaneKind.INFER else settings.jobs_ack_wait_s
    return {
        "name": name,
        "durable_name": name,
        "filter_subject": names.lane(lane),
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "replay_policy": "instant",
        "ack_wait": int(wait * NANOSECONDS),
        "max_deliver": -1,
        "max_ack_pending": 20_000,
        "max_waiting": 4096,
        "priority_groups": [PRIORITY_GROUP],
        "priority_policy": "prioritized",
    }


async def ensure_lane(bus: Bus, lane: Lane, settings: Settings) -> None:
    """Create the durable pull consumer of a lane, or update it."""
    config = lane_config(bus.names, lane, settings)
    stream, name, subject = bus.names.lane_stream(lane), config["name"], config["filter_subject"]
    create = f"CONSUMER.CREATE.{stream}.{name}.{subject}", {"stream_name": stream, "config": config}
    made = await bus.api(*create)
    if lane.kind is LaneKind.JOB and await _is_ahead(bus, made):
        await bus.api(f"CONSUMER.DELETE.{stream}.{name}")
        await bus.api(*create)
        metrics.LANES_MADE_AGAIN.labels("ahead").inc()
        log.warning("lane %s: recreated a consumer ahead of its stream", subject, extra={"action": "lane_made_again"})


async def _is_ahead(bus: Bus, made: dict[str, Any]) -> bool:
    """Return True if a new consumer took over a state ahead of its stream, as after a power cut."""
    age = datetime.fromisoformat(made["ts"]) - datetime.fromisoformat(made["created"])
    if not made["delivered"]["stream_seq"] or age.total_seconds() > _JUST_MADE_S:
        return False
    last = (await bus.api(f"STREAM.INFO.{made['stream_name']}"))["state"]["last_seq"]
    return bool(made["delivered"]["stream_seq"] > last)
