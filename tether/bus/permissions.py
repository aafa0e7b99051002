"""What each role may publish and subscribe on the broker: one table, read by every server configuration we write.

A NATS wildcard stands for whole tokens only, so streams and buckets are listed one by one. An empty allow list would
allow everything; no role has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tether.envelope import Role
from tether.subjects import Names

BUCKETS = (
    "liveness",
    "models",
    "aliases",
    "routes",
    "assign",
    "keyset",
    "apikeys",
    "keyuse",
    "tenants",
    "tenantkeys",
    "jobs",
    "attempts",
)
"""Every key-value bucket of the platform."""

DISPATCHER_SERVICES = ("registerWorker", "findAvailableWorker", "listWorkers")
MODELSTORE_SERVICES = ("registerModel",)
WORKER_SERVICES = ("runInference", "checkCapacity", "getModelStatus")

_DISCOVERY = "$SRV.>"
_NEVER = (
    "$JS.API.STREAM.DELETE.>",
    "$JS.API.STREAM.PURGE.>",
    "$JS.API.STREAM.RESTORE.>",
    "$JS.API.STREAM.SNAPSHOT.>",
)
_LOOK = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.CONSUMER.NAMES.*",
    "$JS.API.CONSUMER.LIST.*",
    "$JS.API.CONSUMER.INFO.*.*",
    "$JS.API.STREAM.MSG.GET.*",
    "$JS.API.DIRECT.GET.>",
)


@dataclass(frozen=True)
class Permissions:
    """Allow lists of one NATS user. ``responds``: it may answer, once, each request it receives."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    publish_deny: tuple[str, ...] = ()
    responds: bool = False


def role_permissions(names: Names) -> dict[Role, Permissions]:
    """The table, for one platform's prefix, shards and partitions."""
    return {
        Role.GATEWAY: _gateway(names),
        Role.DISPATCHER: _dispatcher(names),
        Role.WORKER: _worker(names),
        Role.MODELSTORE: _modelstore(names),
        Role.ADMIN: _admin(names),
    }


def role_inbox(names: Names, role: Role) -> str:
    """Where answers to a role's requests arrive; each identity has its own branch below it."""
    return f"{names.inbox(role.value)}.>"


def _gateway(names: Names) -> Permissions:
    return Permissions(
        publish=(
            f"{names.prefix}.infer.>",
            f"{names.prefix}.job.>",
            names.results(),
            names.service("*"),
            names.audit_subjects(),
            names.demand(),
            *_keys(names, "jobs", "apikeys", "keyuse", "tenants", "tenantkeys"),
            *_objects(names),
            *_read(names, "jobs", "attempts", "models", "aliases", "routes", "apikeys", "keyuse", "tenants"),
            *_read(names, "tenantkeys", "liveness", "keyset"),
            *_get(names.results_stream),
            *_get(names.audit_stream),
            *_read_objects(names),
        ),
        subscribe=(
            role_inbox(names, Role.GATEWAY),
            names.reply("*"),
            names.results(),
            names.demand(),
            *_keys(names, "models", "aliases", "routes", "apikeys", "liveness", "tenants", "tenantkeys", "keyset"),
        ),
    )


def _dispatcher(names: Names) -> Permissions:
    return Permissions(
        publish=("$JS.API.>", *_keys(names, "assign", "routes", "keyset"), names.audit_subjects(), _DISCOVERY),
        publish_deny=_NEVER,
        subscribe=(
            role_inbox(names, Role.DISPATCHER),
            *_keys(names, "liveness", "models", "aliases", "assign", "routes", "tenants", "keyset"),
            *_services(names, DISPATCHER_SERVICES),
        ),
        responds=True,
    )


def _worker(names: Names) -> Permissions:
    lanes = [names.infer_stream(shard) for shard in range(names.infer_shards)]
    lanes += [names.jobs_stream(shard) for shard in range(names.job_shards)]
    return Permissions(
        publish=(
            *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*" for stream in lanes),
            *(f"$JS.ACK.{stream}.>" for stream in lanes),
            *(f"$JS.ACK.*.*.{stream}.>" for stream in lanes),
            names.reply("*"),
            names.results(),
            names.dead_subjects(),
            names.service("registerWorker"),
            # one key each: a worker has a single-token name
            names.bucket_key("liveness", "*"),
            names.bucket_key("attempts", "*"),
            *_read(names, "models", "assign", "attempts", "tenantkeys", "keyset"),
            *_get(names.results_stream),
            *_read_objects(names),
        ),
        subscribe=(
            role_inbox(names, Role.WORKER),
            *_keys(names, "assign", "models", "tenantkeys", "keyset"),
            *_services(names, WORKER_SERVICES),
        ),
        responds=True,
    )


def _modelstore(names: Names) -> Permissions:
    return Permissions(
        publish=(
            *_keys(names, "models", "aliases"),
            names.audit_subjects(),
            *_objects(names),
            *_read(names, "models", "aliases", "tenants", "keyset"),
            *_read_objects(names),
        ),
        subscribe=(
            role_inbox(names, Role.MODELSTORE),
            *_keys(names, "models", "aliases", "tenants", "keyset"),
            *_services(names, MODELSTORE_SERVICES),
        ),
        responds=True,
    )


def _admin(names: Names) -> Permissions:
    return Permissions(
        publish=(
            *_LOOK,
            *_keys(names, "apikeys", "tenants", "keyset"),
            names.audit_subjects(),
            names.service("*"),
            _DISCOVERY,
        ),
        subscribe=(role_inbox(names, Role.ADMIN), *_keys(names, *BUCKETS)),
    )


def _keys(names: Names, *buckets: str) -> tuple[str, ...]:
    """All entries of the buckets: to publish is to write, to subscribe is to watch."""
    return tuple(names.bucket_key(bucket, ">") for bucket in buckets)


def _get(stream: str) -> tuple[str, str]:
    return f"$JS.API.DIRECT.GET.{stream}", f"$JS.API.DIRECT.GET.{stream}.>"


def _read(names: Names, *buckets: str) -> tuple[str, ...]:
    return tuple(subject for bucket in buckets for subject in _get(names.bucket_stream(bucket)))


def _objects(names: Names) -> tuple[str, ...]:
    return tuple(f"$O.{bucket}.>" for bucket in names.chunk_buckets())


def _read_objects(names: Names) -> tuple[str, ...]:
    return tuple(subject for bucket in names.chunk_buckets() for subject in _get(names.object_stream(bucket)))


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
