"""What each identity may publish and subscribe on the broker: one table, read by every configuration we write.

A NATS wildcard stands for whole tokens only, so streams and buckets are listed one by one. An empty allow list would
allow everything; no role has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tether.envelope import Role
from tether.job import SHARED
from tether.subjects import Names

DISPATCHER_SERVICES = ("registerWorker",)
MODELSTORE_SERVICES = ("registerModel", "changeModel", "configureModel")

_DISCOVERY = "$SRV.>"
_NEVER = ("$JS.API.CONSUMER.MSG.NEXT.>",)
"""Taking work from a lane: not even the dispatcher, who makes them."""
_STREAMS = (
    *(f"$JS.API.STREAM.{verb}.*" for verb in ("CREATE", "UPDATE", "INFO", "MSG.GET", "MSG.DELETE")),
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.INFO",
    "$JS.API.CONSUMER.>",
    "$JS.API.DIRECT.>",
)
"""What the dispatcher does with streams: neither destroying nor copying one."""
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
    """Allow lists of one NATS user. ``responds``: it may answer, once, each request it receives."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    publish_deny: tuple[str, ...] = ()
    responds: bool = False


def identity_permissions(names: Names, role: Role, name: str, tenant: str = "") -> Permissions:
    """What one identity may do; ``tenant`` is the isolated tenant that a worker is bound to, or empty."""
    inbox = f"{names.inbox(role.value, name)}.>"
    match role:
        case Role.GATEWAY:
            return _gateway(names, inbox)
        case Role.DISPATCHER:
            return _dispatcher(names, inbox)
        case Role.WORKER:
            return _worker(names, inbox, name, tenant or SHARED)
        case Role.MODELSTORE:
            return _modelstore(names, inbox)
        case Role.ADMIN:
            return _admin(names, inbox)


def _gateway(names: Names, inbox: str) -> Permissions:
    """Gateways serve every tenant. The streams of isolated ones come and go, so no list could name them."""
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


def _dispatcher(names: Names, inbox: str) -> Permissions:
    infer = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    return Permissions(
        publish=(
            *_STREAMS,
            # they hold nothing that outlives a server, and are made again when theirs is away
            *(f"$JS.API.STREAM.DELETE.{stream}" for stream in infer),
            # records of jobs that are forgotten, one by one
            f"$JS.API.STREAM.PURGE.{names.bucket_stream('jobs')}",
            *_keys(names, "assign", "routes", "keyset", "jobs"),
            f"{names.prefix}.result.>",
            names.audit_subjects(),
            _DISCOVERY,
        ),
        publish_deny=_NEVER,
        subscribe=(
            inbox,
            *_keys(names, "liveness", "models", "aliases", "configs", "assign", "routes", "tenants", "keyset"),
            names.every_end(),
            *_services(names, DISPATCHER_SERVICES),
        ),
        responds=True,
    )


def _worker(names: Names, inbox: str, name: str, scope: str) -> Permissions:
    """One worker: its own key in ``assign`` and ``liveness``, and the lanes, results, notes and dead letters of its
    scope. All but results are read one subject at a time, so that it cannot enumerate what it was not told of."""
    lanes = _lane_streams(names, scope)
    own_order, note = names.bucket_key("assign", name), names.bucket_key("attempts", names.attempt_key("*", scope))
    return Permissions(
        publish=(
            *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*" for stream in lanes),
            *(f"$JS.ACK.{stream}.>" for stream in lanes),
            *(f"$JS.ACK.*.*.{stream}.>" for stream in lanes),
            names.reply("*"),
            names.results(scope),
            names.dead_subjects(scope),
            names.service("registerWorker"),
            names.bucket_key("liveness", name),
            names.piece(name),
            note,
            _last(names.bucket_stream("attempts"), note),
            _last(names.bucket_stream("assign"), own_order),
            *_read_last(names, "models", "configs", "tenantkeys", "modelkeys"),
            *_read(names, "keyset"),
            f"$JS.API.DIRECT.GET.{names.scope_results_stream(scope)}",
            _last(names.scope_results_stream(scope), names.results(scope)),
            *(_last(names.object_stream(bucket), names.object_chunk(bucket, "*")) for bucket in names.chunk_buckets()),
        ),
        subscribe=(
            inbox,
            own_order,
            names.wanted(name),
            names.all_withdrawn(scope),
            *_keys(names, "tenantkeys", "modelkeys", "keyset"),
        ),
    )


def _lane_streams(names: Names, scope: str) -> list[str]:
    if scope != SHARED:
        return [names.scope_infer_stream(scope), names.scope_jobs_stream(scope)]
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
            names.wanted("*"),
            *_get(names.audit_stream),
            *_read_objects(names),
            *_keep_objects(names),
        ),
        subscribe=(
            inbox,
            *_keys(names, "models", "aliases", "modelkeys", "tenants", "keyset"),
            names.piece("*"),
            _DISCOVERY,
            *(names.store_services(endpoint) for endpoint in MODELSTORE_SERVICES),
        ),
        responds=True,
    )


def _admin(names: Names, inbox: str) -> Permissions:
    return Permissions(
        publish=(
            *_LOOK,
            *_keys(names, "apikeys", "tenants", "keyset"),
            *_read(names, "apikeys", "tenants", "keyset"),
            *_get(names.audit_stream),
            names.audit_subjects(),
            _DISCOVERY,
        ),
        subscribe=(inbox, *_keys(names, "apikeys", "tenants", "keyset")),
    )


def _keys(names: Names, *buckets: str) -> tuple[str, ...]:
    """All entries of the buckets: to publish is to write, to subscribe is to watch."""
    return tuple(names.bucket_key(bucket, ">") for bucket in buckets)


def _get(stream: str) -> tuple[str, str]:
    """Both forms of a direct get: what is wanted in the body, which may be anything in the stream, or in the subject."""
    return f"$JS.API.DIRECT.GET.{stream}", f"$JS.API.DIRECT.GET.{stream}.>"


def _last(stream: str, subject: str) -> str:
    """A direct get of the last message of one subject; the server refuses a body with it."""
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
    """What looking after pieces takes: their number, and the deletion of single ones by sequence."""
    streams = [names.object_stream(bucket) for bucket in names.chunk_buckets()]
    return tuple(f"$JS.API.STREAM.{verb}.{stream}" for stream in streams for verb in ("INFO", "MSG.DELETE"))


def _services(names: Names, endpoints: tuple[str, ...]) -> tuple[str, ...]:
    return (_DISCOVERY, *(names.service(endpoint) for endpoint in endpoints))


def nats_block(permissions: Permissions, indent: str) -> str:
    """The ``permissions`` block of one user in nats.conf syntax."""
    lines = [
        "publish: {",
        _listed("allow", permissions.publish),
        *([_listed("deny", permissions.publish_deny)] if permissions.publish_deny else []),
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
