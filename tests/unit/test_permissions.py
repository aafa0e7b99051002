"""The allow lists give each role what it needs and nothing of another's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import wildcards
from brokers import make_certificate

from tether.bus.config import ops_files, write_ops_files
from tether.bus.permissions import BUCKETS, Permissions, nats_block, role_inbox, role_permissions
from tether.bus.server import Binary
from tether.envelope import Role
from tether.home import Home
from tether.job import Lane, LaneKind
from tether.subjects import Names

SHIPPED = Path(__file__).parents[2] / "ops" / "nats"
NAMES = Names("acme", infer_shards=2, job_shards=3, partitions=2)
TABLE = role_permissions(NAMES)


def may_subscribe(role: Role, subject: str) -> bool:
    return wildcards.may_subscribe(TABLE[role], subject)


def publishers(subject: str) -> set[Role]:
    return {role for role in Role if wildcards.may_publish(TABLE[role], subject)}


WRITERS = {
    "models": {Role.MODELSTORE},
    "aliases": {Role.MODELSTORE},
    "routes": {Role.DISPATCHER},
    "assign": {Role.DISPATCHER},
    "apikeys": {Role.GATEWAY, Role.ADMIN},
    "jobs": {Role.GATEWAY},
    "attempts": {Role.WORKER},
    "liveness": {Role.WORKER},
    "keyset": {Role.ADMIN, Role.DISPATCHER},  # what counts in it is the root key's signature
    "keyuse": {Role.GATEWAY},
    "tenants": {Role.GATEWAY, Role.ADMIN},
    "tenantkeys": {Role.GATEWAY},
}


def test_every_bucket_has_its_writers_named() -> None:
    assert set(WRITERS) == set(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_only_its_writers_may_write_a_bucket(bucket: str) -> None:
    assert publishers(NAMES.bucket_key(bucket, "key")) == WRITERS[bucket]


@pytest.mark.parametrize("kind", LaneKind)
@pytest.mark.parametrize("model", ["a", "b", "c", "digits"])
def test_only_gateways_fill_lanes_and_only_workers_empty_them(kind: LaneKind, model: str) -> None:
    lane = Lane(kind, model, 1)
    stream, consumer = NAMES.lane_stream(lane), NAMES.lane_consumer(lane)
    assert publishers(NAMES.lane(lane)) == {Role.GATEWAY}
    assert publishers(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}") == {Role.WORKER, Role.DISPATCHER}
    assert publishers(f"$JS.ACK.{stream}.{consumer}.1.2.3.4.5") == {Role.WORKER}
    assert publishers(f"$JS.ACK._.hash.{stream}.{consumer}.1.2.3.4.5.token") == {Role.WORKER}


def test_only_the_dispatcher_changes_streams_and_it_destroys_none() -> None:
    stream = NAMES.jobs_stream(0)
    for verb in ("STREAM.CREATE", "STREAM.UPDATE"):
        assert publishers(f"$JS.API.{verb}.{stream}") == {Role.DISPATCHER}
    assert publishers(f"$JS.API.CONSUMER.CREATE.{stream}.lane") == {Role.DISPATCHER}
    for verb in ("DELETE", "PURGE", "RESTORE", "SNAPSHOT"):
        assert publishers(f"$JS.API.STREAM.{verb}.{stream}") == set()


def test_a_role_hears_its_own_answers_and_nobody_elses() -> None:
    for role in Role:
        for other in Role:
            heard = may_subscribe(role, f"{NAMES.inbox(other.value)}.some-identity.1")
            assert heard == (role is other)
        assert not may_subscribe(role, "_INBOX.anyone")
        assert role_inbox(NAMES, role) in TABLE[role].subscribe


def test_services_are_served_by_their_own_role_only() -> None:
    served = {
        "registerWorker": {Role.DISPATCHER},
        "registerModel": {Role.MODELSTORE},
        "runInference": {Role.WORKER},
    }
    for endpoint, roles in served.items():
        assert {role for role in Role if may_subscribe(role, NAMES.service(endpoint))} == roles


@pytest.mark.parametrize("role", Role)
def test_no_list_is_empty_or_of_another_prefix(role: Role) -> None:
    table = TABLE[role]
    assert table.publish
    assert table.subscribe
    for subject in table.publish + table.subscribe:
        assert subject.startswith(("acme.", "_INBOX.acme.", "$JS.", "$KV.ACME_", "$O.ACME_", "$SRV."))
        assert subject != "$JS.ACK.>"


def test_a_block_without_answers_does_not_allow_them() -> None:
    assert "allow_responses" not in nats_block(Permissions(("a",), ("b",)), "")
    assert "allow_responses" in nats_block(Permissions(("a",), ("b",), responds=True), "")


def test_the_shipped_files_are_the_table() -> None:
    shipped = {path.name: path.read_text() for path in SHIPPED.glob("*.conf")}
    assert shipped == ops_files(), "run: tether init --nats-config, and copy the changed files to ops/nats"


@pytest.mark.parametrize("name", sorted(ops_files()))
def test_production_files_have_tls_and_no_file_has_an_anonymous_user(name: str) -> None:
    text = ops_files()[name]
    assert "no_auth_user" not in text
    if name.startswith(("single", "cluster")):
        assert "cert_file" in text
        assert "sync_interval: always" in text
        assert 'http: "127.0.0.1:8222"' in text


@pytest.mark.parametrize("name", sorted(set(ops_files()) - {"permissions.conf"}))
def test_the_server_accepts_a_shipped_file(name: str, home: Home, nats_binary: Binary, tmp_path: Path) -> None:
    write_ops_files(tmp_path, home)
    config = tmp_path / name
    make_certificate(tmp_path)
    config.write_text(config.read_text().replace("/etc/nats/tls", str(tmp_path)))
    done = subprocess.run([nats_binary.path, "-t", "-c", config], capture_output=True, text=True, check=False)
    assert "is valid" in done.stderr, done.stderr
