"""The allow lists give each role what it needs and nothing of another's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.brokers import wildcards

from tether.broker.embedded_server import Binary
from tether.broker.nats_config import DEFAULT_LOGINS, logins_of, ops_files, write_ops_files
from tether.broker.permissions import OWN_RIGHTS, Permissions, identity_permissions, nats_block
from tether.crypto import Role
from tether.domain.job import SHARED, Lane, LaneKind
from tether.identity.certificates import make_certificates
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.wire.subjects import BUCKETS, Names

SHIPPED = Path(__file__).parents[3] / "ops" / "nats"
NAMES = Names("acme", infer_shards=2, job_shards=3, partitions=2)
WORKERS = (("shared-1", ""), ("shared-2", ""), ("own-1", "acme.eu"), ("own-2", "other"))
"""Name and isolated tenant."""
TABLE = {
    **{role.value: identity_permissions(NAMES, role, role.value) for role in Role if role is not Role.WORKER},
    **{name: identity_permissions(NAMES, Role.WORKER, name, tenant) for name, tenant in WORKERS},
}
ALL_WORKERS = {name for name, _ in WORKERS}
SHARED_WORKERS = {"shared-1", "shared-2"}


def may_subscribe(name: str, subject: str) -> bool:
    return wildcards.may_subscribe(TABLE[name], subject)


def publishers(subject: str) -> set[str]:
    return {name for name, row in TABLE.items() if wildcards.may_publish(row, subject)}


WRITERS = {
    "models": {"modelstore"},
    "aliases": {"modelstore"},
    "configs": {"modelstore"},
    "notes": {"modelstore"},
    "leases": {"modelstore"},
    "routes": {"dispatcher"},
    "assign": {"dispatcher"},
    "apikeys": {"gateway", "admin"},
    "jobs": {"gateway", "dispatcher"},
    "attempts": set(),  # each worker those of its pool
    "liveness": set(),  # each worker its own
    "keyset": {"admin", "dispatcher"},  # what counts in it is the root key's signature
    "keyuse": {"gateway"},
    "tenants": {"gateway", "admin"},
    "tenantkeys": {"gateway"},
    "modelkeys": {"modelstore"},
    "puts": {"gateway"},
}


def test_every_bucket_has_its_writers_named() -> None:
    assert set(WRITERS) == set(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_only_its_writers_may_write_a_bucket(bucket: str) -> None:
    assert publishers(NAMES.bucket_key(bucket, "key")) == WRITERS[bucket]


@pytest.mark.parametrize("kind", LaneKind)
@pytest.mark.parametrize("model", ["a", "b", "c", "digits"])
@pytest.mark.parametrize(
    ("pool", "workers"), [(SHARED, SHARED_WORKERS), ("acme.eu", {"own-1"}), ("other", {"own-2"}), ("third", set())]
)
def test_only_gateways_fill_lanes_and_only_workers_of_their_pool_empty_them(
    kind: LaneKind, model: str, pool: str, workers: set[str]
) -> None:
    lane = Lane(kind, model, 1, pool=pool)
    stream, consumer = NAMES.lane_stream(lane), NAMES.lane_consumer(lane)
    assert publishers(NAMES.lane(lane)) == {"gateway"}
    assert publishers(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}") == workers
    assert publishers(f"$JS.ACK.{stream}.{consumer}.1.2.3.4.5") == workers
    assert publishers(f"$JS.ACK._.hash.{stream}.{consumer}.1.2.3.4.5.token") == workers
    assert publishers(NAMES.dead(lane)) == workers
    assert publishers(NAMES.result("job", pool)) == workers | {"gateway", "dispatcher"}
    note = NAMES.bucket_key("attempts", NAMES.attempt_key("job", pool))
    assert publishers(note) == workers
    assert publishers(f"$JS.API.DIRECT.GET.{NAMES.bucket_stream('attempts')}.{note}") == workers | {"gateway"}


def test_a_worker_writes_its_own_heartbeat_and_reads_its_own_orders() -> None:
    for name in ALL_WORKERS:
        order = NAMES.bucket_key("assign", name)
        assert publishers(NAMES.bucket_key("liveness", name)) == {name}
        assert publishers(f"$JS.API.DIRECT.GET.{NAMES.bucket_stream('assign')}.{order}") & ALL_WORKERS == {name}
        assert {other for other in ALL_WORKERS if may_subscribe(other, order)} == {name}


def test_an_identity_hears_its_own_answers_and_nobody_elses() -> None:
    roles = {name: Role.WORKER if name in ALL_WORKERS else Role(name) for name in TABLE}
    for name, role in roles.items():
        heard = {other for other in TABLE if may_subscribe(other, f"{NAMES.inbox(role.value, name)}.f00.r.1")}
        assert heard == {name}
        assert not may_subscribe(name, "_INBOX.anyone")


def test_services_are_served_by_their_own_role_only() -> None:
    served = {
        "registerWorker": ({"dispatcher"}, ALL_WORKERS),
        "registerModel.0.1": ({"modelstore"}, {"gateway"}),
        "configureModel.0.1": ({"modelstore"}, {"gateway"}),
        "registerModel": (set(), set()),
        "anything": (set(), set()),
    }
    for endpoint, (servers, callers) in served.items():
        assert {name for name in TABLE if may_subscribe(name, NAMES.service(endpoint))} == servers
        assert publishers(NAMES.service(endpoint)) == callers


def test_a_worker_hears_what_is_wanted_of_itself_and_answers_for_itself() -> None:
    for name in ALL_WORKERS:
        assert publishers(NAMES.wanted(name)) == {"modelstore"}
        assert {other for other in TABLE if may_subscribe(other, NAMES.wanted(name))} == {name}
        assert publishers(NAMES.chunk(name)) == {name}
        assert {other for other in TABLE if may_subscribe(other, NAMES.chunk(name))} == {"modelstore"}


def test_a_worker_hears_what_gateways_withdraw_from_the_lanes_of_its_pool() -> None:
    for pool, hearers in ((SHARED, SHARED_WORKERS), ("acme.eu", {"own-1"}), ("other", {"own-2"})):
        subject = NAMES.withdrawn(Lane(LaneKind.INFER, "m.onnx", 3, "local", pool))
        assert publishers(subject) == {"gateway"}
        assert {name for name in TABLE if may_subscribe(name, subject)} == hearers


@pytest.mark.parametrize("name", TABLE)
def test_no_list_is_empty_or_of_another_prefix(name: str) -> None:
    table = TABLE[name]
    assert table.publish
    assert table.subscribe
    for subject in table.publish + table.subscribe:
        ours = subject.startswith(("acme.", "_INBOX.acme.", "$JS.", "$KV.ACME_", "$O.ACME_", "$SRV."))
        assert ours or subject == OWN_RIGHTS
        assert subject != "$JS.ACK.>"


def test_a_block_without_answers_does_not_allow_them() -> None:
    assert "allow_responses" not in nats_block(Permissions(("a",), ("b",)), "")
    assert "allow_responses" in nats_block(Permissions(("a",), ("b",), responds=True), "")


def test_the_shipped_files_are_the_table() -> None:
    shipped = {path.name: path.read_text() for path in SHIPPED.glob("*.conf")}
    assert shipped == ops_files(), "run: tether init --nats-config, and copy the changed files to ops/nats"


def test_a_new_home_has_the_identities_that_the_shipped_files_name(home: Home, tmp_path: Path) -> None:
    create_home(home, workers=2)
    write_ops_files(tmp_path, home)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.conf") if path.name != "users.conf"} == ops_files()
    assert [login.name for login in logins_of(home)] == [login.name for login in DEFAULT_LOGINS]


@pytest.mark.parametrize("name", sorted(ops_files()))
def test_production_files_have_tls_and_no_file_has_an_anonymous_user(name: str) -> None:
    text = ops_files()[name]
    words = {line.split()[0].strip("{:") for line in text.splitlines() if line.strip()}
    assert (
        words & {"no_auth_user", "mqtt", "websocket", "leafnodes", "gateway", "authorization", "default_permissions"}
        == set()
    )
    if name.startswith(("single", "cluster")):
        assert text.count("verify: true") == text.count("cert_file") > 0
        assert "cipher: chacha\n  key: $NATS_JETSTREAM_KEY\n" in text
        assert "sync_interval: always" in text
        assert 'http: "127.0.0.1:8222"' in text


@pytest.mark.parametrize("name", sorted(set(ops_files()) - {"permissions.conf"}))
def test_the_server_accepts_a_shipped_file(name: str, home: Home, nats_binary: Binary, tmp_path: Path) -> None:
    write_ops_files(tmp_path, home)
    config = tmp_path / name
    make_certificates(home, [])
    config.write_text(config.read_text().replace("/etc/nats/tls", str(home.tls_file(""))))
    done = subprocess.run(
        [nats_binary.path, "-t", "-c", config],
        capture_output=True,
        text=True,
        check=False,
        env={"NATS_JETSTREAM_KEY": "k"},
    )
    assert "is valid" in done.stderr, done.stderr
