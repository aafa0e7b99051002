"""Every verb of the JetStream API on every stream: who may ask for it. What is in no rule here is nobody's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.brokers import verbs, wildcards

from tether.broker.permissions import identity_permissions, streams_made
from tether.crypto import Role
from tether.domain.job import SHARED
from tether.settings import Settings
from tether.streams.layout import pool_streams, streams
from tether.wire.subjects import BUCKETS, Names

NAMES = Names("acme", infer_shards=2, job_shards=2, partitions=2)
POOLS = ("acme.eu", "other")
WORKERS = {"shared-1": "", "own-1": "acme.eu", "own-2": "other"}
"""Name and isolated tenant."""
TABLE = {
    **{
        role.value: identity_permissions(NAMES, role, role.value, pools=POOLS)
        for role in Role
        if role is not Role.WORKER
    },
    **{name: identity_permissions(NAMES, Role.WORKER, name, tenant, POOLS) for name, tenant in WORKERS.items()},
}
STREAMS = streams_made(NAMES, POOLS)
ELSEWHERE = ["ACME_INFER_=third", "KV_OTHER_models", "COPY", "*"]
"""Streams of a tenant that no worker is bound to, of another platform, and of somebody's invention; and a wildcard."""

INFER = {NAMES.infer_stream(shard) for shard in range(2)}
JOBS = {NAMES.jobs_stream(shard) for shard in range(2)}
OWN = {stream: name for name, tenant in WORKERS.items() if tenant for stream in NAMES.pool_streams(tenant)[:2]}
RESULTS = {NAMES.results_stream, *(NAMES.pool_results_stream(pool) for pool in POOLS)}
CHUNKS = {NAMES.object_stream(bucket) for bucket in NAMES.chunk_buckets()}


def bucket(stream: str) -> str:
    return next((name for name in BUCKETS if NAMES.bucket_stream(name) == stream), "")


READ_WHOLE = {
    "modelstore": {
        "models",
        "aliases",
        "configs",
        "notes",
        "modelkeys",
        "leases",
        "routes",
        "tenants",
        "keyset",
        "assign",
    },
    "dispatcher": {"jobs", "assign", "routes", "liveness", "models", "aliases", "configs", "tenants", "keyset"},
    "admin": {"apikeys", "tenants", "keyset"},
    **{name: {"keyset"} for name in WORKERS},
}
"""Buckets that each role may read with a wish in the body, so in any order and all at once. A gateway may read every stream so."""


def readers(stream: str) -> set[str]:
    found = {name for name, buckets in READ_WHOLE.items() if bucket(stream) in buckets}
    if stream in CHUNKS:
        found.add("modelstore")
    if stream in RESULTS:
        found.add("dispatcher")
    if stream == NAMES.audit_stream:
        found |= {"dispatcher", "modelstore", "admin"}
    return found | {"gateway"}


def pullers(stream: str) -> set[str]:
    return {"shared-1"} if stream in INFER | JOBS else {OWN[stream]} if stream in OWN else set()


DISPATCHER, LOOKERS, NOBODY = {"dispatcher"}, {"dispatcher", "admin"}, set[str]()
RULES: dict[str, Callable[[str], set[str]]] = {
    "create": lambda stream: DISPATCHER if stream in STREAMS else NOBODY,
    "update": lambda stream: {"admin"} if stream in STREAMS else NOBODY,
    "info": lambda stream: {
        *LOOKERS,
        "gateway",
        *(["modelstore"] if stream in CHUNKS else []),
        *(name for name, tenant in WORKERS.items() if stream == NAMES.pool_results_stream(tenant or SHARED)),
    },
    "delete": lambda stream: DISPATCHER if stream in INFER else NOBODY,
    "purge": lambda stream: DISPATCHER if stream == NAMES.bucket_stream("jobs") else NOBODY,
    "get": lambda stream: DISPATCHER if stream in JOBS or (stream in OWN and "JOBS" in stream) else NOBODY,
    "delete message": lambda stream: (
        {"modelstore"} if stream in CHUNKS else DISPATCHER if stream in RESULTS else NOBODY
    ),
    "direct get": readers,
    "consumer info": lambda _: LOOKERS,
    "consumer names": lambda _: LOOKERS,
    "consumer list": lambda _: LOOKERS,
    "delete consumer": lambda stream: DISPATCHER if pullers(stream) else NOBODY,
    "next": pullers,
    "acknowledge": pullers,
    "acknowledge, second form": pullers,
}


def may(subject: str) -> set[str]:
    return {name for name, row in TABLE.items() if wildcards.may_publish(row, subject)}


def test_the_streams_that_are_named_are_those_that_are_made() -> None:
    made = [config["name"] for config in streams(NAMES, Settings())]
    made += [config["name"] for pool in POOLS for config in pool_streams(NAMES, pool, Settings())]
    assert sorted(made) == sorted(STREAMS)


@pytest.mark.parametrize("verb", [verb for verb in verbs.OF_STREAM if "{subject}" not in verbs.OF_STREAM[verb]])
def test_a_verb_of_a_stream_is_for_whom_the_rule_says(verb: str) -> None:
    for stream in [*STREAMS, *ELSEWHERE]:
        wanted = RULES[verb](stream) if verb in RULES else NOBODY
        assert may(verbs.OF_STREAM[verb].format(stream=stream)) == wanted, stream


@pytest.mark.parametrize("stream", [*STREAMS, *ELSEWHERE])
def test_consumers_are_made_on_lanes_alone(stream: str) -> None:
    pattern = verbs.OF_STREAM["filtered consumer"]
    lanes = ("acme.infer.0.local.shared.m.1", "acme.job.1.normal.local.shared.m.1")
    for lane in lanes:
        assert may(pattern.format(stream=stream, subject=lane)) == (DISPATCHER if pullers(stream) else NOBODY)
    for other in ("$KV.ACME_apikeys.x", "$O.ACME_CHUNKS_0.C.x", ">", "*"):
        assert may(pattern.format(stream=stream, subject=other)) == NOBODY


@pytest.mark.parametrize("verb", verbs.OF_ACCOUNT)
def test_a_verb_of_the_account_is_for_whom_the_rule_says(verb: str) -> None:
    rule = {"account": {"admin"}, "stream names": LOOKERS, "stream list": {"admin"}}
    assert may(verbs.OF_ACCOUNT[verb]) == rule.get(verb, NOBODY)


@pytest.mark.parametrize(
    "subject", ["acme.result.job", "acme.result.*", "acme.result.=acme=eu.job", "acme.result.>", "*"]
)
@pytest.mark.parametrize("stream", sorted(RESULTS))
def test_no_worker_reads_a_result(stream: str, subject: str) -> None:
    for pattern in (verbs.OF_STREAM["direct get"], verbs.OF_STREAM["direct get by subject"]):
        assert not may(pattern.format(stream=stream, subject=subject)) & WORKERS.keys()


@pytest.mark.parametrize("key", ["m", "m.1", "worker-1", "x.shared", "x.=acme=eu"])
@pytest.mark.parametrize("name", BUCKETS)
def test_a_key_of_a_bucket_is_read_by_who_reads_the_bucket_or_knows_the_key(name: str, key: str) -> None:
    stream, subject = NAMES.bucket_stream(name), NAMES.bucket_key(name, key)
    found = may(verbs.OF_STREAM["direct get by subject"].format(stream=stream, subject=subject))
    known = set(WORKERS) if name in ("models", "configs", "tenantkeys", "modelkeys") else NOBODY
    if name == "attempts":
        known = {worker for worker, tenant in WORKERS.items() if key == NAMES.attempt_key("x", tenant or "shared")}
    gateway = {"gateway"} - ({"gateway"} if name == "assign" else NOBODY)
    assert found == {reader for reader, buckets in READ_WHOLE.items() if name in buckets} | known | gateway
