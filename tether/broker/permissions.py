"""Publish and subscribe permissions of each identity: one table for every configuration we write.

A NATS wildcard stands for whole tokens only, so streams and buckets are listed one by one. An empty allow
list would allow everything; no role has one. A right is a subject: the content of a request, such as the
sources of a new stream, cannot be restricted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tether.crypto import Role
from tether.domain.job import SHARED
from tether.wire.subjects import BUCKETS, Names

DISPATCHER_SERVICES = ("registerWorker",)
MODELSTORE_SERVICES = ("registerModel", "changeModel", "configureModel")

_DISCOVERY = "$SRV.>"
OWN_RIGHTS = "$SYS.REQ.USER.INFO"
"""Every login may query its own rights: 'tether doctor' does, because the server logs each refusal as an error."""

_LOOK = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.CONSUMER.NAMES.*",
    "$JS.API.CONSUMER.LIST.*",
    "$JS.API.CONSUMER.INFO.*.*",
)


@dataclass(frozen=True)
class Permissions:
    """Allow lists of one NATS user. ``responds``: it may answer each request it receives, once."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    responds: bool = False


def matches(pattern: str, subject: str) -> bool:
    """Return whether a concrete subject matches a pattern: ``*`` is one token, ``>`` one or more at the end."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, part in enumerate(wanted):
        if part == ">":
            return len(given) > index
        if index >= len(given) or part not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def identity_permissions(
    names: Names, role: Role, name: str, tenant: str = "", pools: Sequence[str] = ()
) -> Permissions:
    """Return the permissions of one identity. ``tenant``: the isolated tenant of a worker, or empty.
    ``pools``: every tenant
    with a worker of its own; their streams are listed one by one too.
    """
    found = _of_role(names, role, name, tenant, pools)
    return replace(found, publish=(*found.publish, OWN_RIGHTS))


def _of_role(names: Names, role: Role, name: str, tenant: str, pools: Sequence[str]) -> Permissions:
    inbox = f"{names.inbox(role.value, name)}.>"
    match role:
        case Role.GATEWAY:
            return _gateway(names, inbox)
        case Role.DISPATCHER:
            return _dispatcher(names, inbox, pools)
        case Role.WORKER:
            return _worker(names, inbox, name, tenant or SHARED)
        case Role.MODELSTORE:
            return _modelstore(names, inbox)
        case Role.ADMIN:
            return _admin(names, inbox, pools)


def _gateway(names: Names, inbox: str) -> Permissions:
    """Gateways serve every tenant. Streams of isolated tenants come and go, so wildcards cover them."""
    return Permissions(
        publish=(
            f"{names.prefix}.infer.>",
            f"{names.prefix}.job.>",
            f"{names.prefix}.result.>",
            *(names.store_services(endpoint) for endpoint in MODELSTORE_SERVICES),
            names.audit_subjects(),
            names.demand(),
            names.all_withdrawn(),
            *_keys(names, "jobs", "apikeys", "keyuse", "tenants", "tenantkeys", "puts"),
            *_objects(names),
            "$JS.API.DIRECT.GET.*",
            "$JS.API.STREAM.INFO.*",
            *_read_last(names, "jobs", "attempts", "models", "aliases", "routes", "apikeys", "keyuse", "tenants"),
            *_read_last(names, "configs", "notes", "tenantkeys", "modelkeys", "liveness", "keyset", "leases", "puts"),
            f"$JS.API.DIRECT.GET.*.{names.prefix}.result.>",
            f"$JS.API.DIRECT.GET.{names.audit_stream}.>",
            *(f"$JS.API.DIRECT.GET.{names.object_stream(bucket)}.>" for bucket in names.chunk_buckets()),
        ),
        subscribe=(
            inbox,
            names.reply("*"),
            f"{names.prefix}.result.>",
            names.demand(),
            *_keys(names, "models", "aliases", "configs", "notes", "routes", "apikeys", "liveness"),
            *_keys(names, "tenants", "tenantkeys", "modelkeys", "keyset"),
        ),
    )


def _dispatcher(names: Names, inbox: str, pools: Sequence[str]) -> Permissions:
    """The dispatcher creates streams and cannot change any: a right to change one includes emptying or
    copying it. It reads its own inputs, including finished jobs, but no model files and no keys.
    """
    infer = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    jobs = [names.jobs_stream(shard) for shard in range(names.job_shards)]
    jobs += [names.pool_jobs_stream(pool) for pool in pools]
    lanes = [*infer, *(names.pool_infer_stream(pool) for pool in pools), *jobs]
    results = [names.pool_results_stream(pool) for pool in (SHARED, *pools)]
    return Permissions(
        publish=(
            "$JS.API.STREAM.NAMES",
            "$JS.API.STREAM.INFO.*",
            *_calls("CREATE", streams_made(names, pools)),
            # in-memory streams, created again when their server is away
            *_calls("DELETE", infer),
            # pending bundles
            *_calls("MSG.GET", jobs),
            # results and records of expired jobs, one by one
            *_calls("MSG.DELETE", results),
            *_calls("PURGE", [names.bucket_stream("jobs")]),
            *(f"$JS.API.CONSUMER.CREATE.{stream}.*.{names.prefix}.>" for stream in lanes),
            *(f"$JS.API.CONSUMER.DELETE.{stream}.*" for stream in lanes),
            "$JS.API.CONSUMER.NAMES.*",
            "$JS.API.CONSUMER.LIST.*",
            "$JS.API.CONSUMER.INFO.*.*",
            *_read(names, "jobs", "assign", "routes", "liveness", "models", "aliases", "configs", "tenants", "keyset"),
            *(subject for stream in results for subject in _get(stream)),
            # audit writers check that the stream kept their blocks
            *_get(names.audit_stream),
            *_keys(names, "assign", "routes", "keyset", "jobs"),
            f"{names.prefix}.result.>",
            names.audit_subjects(),
            _DISCOVERY,
        ),
        subscribe=(
            inbox,
            *_keys(names, "liveness", "models", "aliases", "configs", "assign", "routes", "tenants", "keyset"),
            names.every_end(),
            *_services(names, DISPATCHER_SERVICES),
        ),
        responds=True,
    )


def streams_made(names: Names, pools: Sequence[str] = ()) -> list[str]:
    """Return every stream of a platform with workers for the isolated tenants ``pools``."""
    return [
        *(names.infer_stream(shard) for shard in range(names.infer_shards)),
        *(names.jobs_stream(shard) for shard in range(names.job_shards)),
        names.results_stream,
        names.dead_stream,
        names.audit_stream,
        *(names.bucket_stream(bucket) for bucket in BUCKETS),
        *(names.object_stream(bucket) for bucket in names.chunk_buckets()),
        *(stream for pool in pools for stream in names.pool_streams(pool)),
    ]


def _worker(names: Names, inbox: str, name: str, pool: str) -> Permissions:
    """A worker may write its own key in ``assign`` and ``liveness``, and use lanes, notes and dead letters of
    its pool, one subject at a time, so that it cannot enumerate others. It writes results of its pool and
    never reads them; it sees how full they are, and with that the ids of finished jobs.
    """
    lanes = _lane_streams(names, pool)
    own_order, note = names.bucket_key("assign", name), names.bucket_key("attempts", names.attempt_key("*", pool))
    return Permissions(
        publish=(
            *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*" for stream in lanes),
            *(f"$JS.ACK.{stream}.>" for stream in lanes),
            *(f"$JS.ACK.*.*.{stream}.>" for stream in lanes),
            names.reply("*"),
            names.results(pool),
            f"$JS.API.STREAM.INFO.{names.pool_results_stream(pool)}",
            names.dead_subjects(pool),
            names.service("registerWorker"),
            names.bucket_key("liveness", name),
            names.chunk(name),
            note,
            _last(names.bucket_stream("attempts"), note),
            _last(names.bucket_stream("assign"), own_order),
            *_read_last(names, "models", "configs", "tenantkeys", "modelkeys"),
            *_read(names, "keyset"),
            *(_last(names.object_stream(bucket), names.object_chunk(bucket, "*")) for bucket in names.chunk_buckets()),
        ),
        subscribe=(
            inbox,
            own_order,
            names.wanted(name),
            names.all_withdrawn(pool),
            *_keys(names, "tenantkeys", "modelkeys", "keyset"),
        ),
    )


def _lane_streams(names: Names, pool: str) -> list[str]:
    if pool != SHARED:
        return [names.pool_infer_stream(pool), names.pool_jobs_stream(pool)]
    shards = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    return shards + [names.jobs_stream(shard) for shard in range(names.job_shards)]


def _modelstore(names: Names, inbox: str) -> Permissions:
    return Permissions(
        publish=(
            *_keys(names, "models", "aliases", "configs", "notes", "modelkeys", "leases"),
            names.audit_subjects(),
            *_objects(names),
            *_read(
                names, "models", "aliases", "configs", "notes", "modelkeys", "leases", "routes", "tenants", "keyset"
            ),
            *_read(names, "assign"),
            names.wanted("*"),
            *_get(names.audit_stream),
            *_read_objects(names),
            *_keep_objects(names),
        ),
        subscribe=(
            inbox,
            *_keys(names, "models", "aliases", "modelkeys", "tenants", "keyset", "assign"),
            names.chunk("*"),
            _DISCOVERY,
            *(names.store_services(endpoint) for endpoint in MODELSTORE_SERVICES),
        ),
        responds=True,
    )


def _admin(names: Names, inbox: str, pools: Sequence[str]) -> Permissions:
    return Permissions(
        publish=(
            *_LOOK,
            *_calls("UPDATE", streams_made(names, pools)),
            *_keys(names, "apikeys", "tenants", "keyset"),
            *_read(names, "apikeys", "tenants", "keyset"),
            *_get(names.audit_stream),
            names.audit_subjects(),
            _DISCOVERY,
        ),
        subscribe=(inbox, *_keys(names, "apikeys", "tenants", "keyset")),
    )


def _calls(verb: str, streams: Iterable[str]) -> tuple[str, ...]:
    """Return subjects of a JetStream API verb for streams listed one by one."""
    return tuple(f"$JS.API.STREAM.{verb}.{stream}" for stream in streams)


def _keys(names: Names, *buckets: str) -> tuple[str, ...]:
    """Return all entries of the buckets: publish is write, subscribe is watch."""
    return tuple(names.bucket_key(bucket, ">") for bucket in buckets)


def _get(stream: str) -> tuple[str, str]:
    """Return both forms of a direct get: with the target in the body, which may be anything in the stream, or
    in the subject.
    """
    return f"$JS.API.DIRECT.GET.{stream}", f"$JS.API.DIRECT.GET.{stream}.>"


def _last(stream: str, subject: str) -> str:
    """Return the direct get of the last message of one subject; the server refuses a body with it."""
    return f"$JS.API.DIRECT.GET.{stream}.{subject}"


def _read(names: Names, *buckets: str) -> tuple[str, ...]:
    return tuple(subject for bucket in buckets for subject in _get(names.bucket_stream(bucket)))


def _read_last(names: Names, *buckets: str) -> tuple[str, ...]:
    return tuple(_last(names.bucket_stream(bucket), names.bucket_key(bucket, ">")) for bucket in buckets)


def _objects(names: Names) -> tuple[str, ...]:
    return tuple(f"$O.{bucket}.>" for bucket in names.chunk_buckets())


def _read_objects(names: Names) -> tuple[str, ...]:
    return tuple(subject for bucket in names.chunk_buckets() for subject in _get(names.object_stream(bucket)))


def _keep_objects(names: Names) -> tuple[str, ...]:
    """Return the rights to maintain chunks: their number, and deletion of single ones by sequence."""
    streams = [names.object_stream(bucket) for bucket in names.chunk_buckets()]
    return (*_calls("INFO", streams), *_calls("MSG.DELETE", streams))


def _services(names: Names, endpoints: tuple[str, ...]) -> tuple[str, ...]:
    return (_DISCOVERY, *(names.service(endpoint) for endpoint in endpoints))


def nats_block(permissions: Permissions, indent: str) -> str:
    """Return the ``permissions`` block of one user in nats.conf syntax."""
    lines = [
        "publish: {",
        _listed("allow", permissions.publish),
        "}",
        "subscribe: {",
        _listed("allow", permissions.subscribe),
        "}",
    ]
    if permissions.responds:
        lines.append('allow_responses: { max: 1, expires: "5m" }')
    body = "\n".join(lines)
    return "{\n" + _indented(body, indent + "  ") + f"\n{indent}}}"


def _listed(name: str, subjects: tuple[str, ...]) -> str:
    rows = "\n".join(f'    "{subject}"' for subject in subjects)
    return f"  {name}: [\n{rows}\n  ]"


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + line for line in text.splitlines())
