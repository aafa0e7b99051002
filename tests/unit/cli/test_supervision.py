"""What supervision decides without any process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tether.broker.embedded_server import judge, parse_version
from tether.broker.nats_config import Ports, embedded_text
from tether.crypto import open_keyset
from tether.errors import ConfigError, Conflict
from tether.identity.keys import SYSTEM_USER, broker_logins, create_home, nats_public_key
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, load_identity
from tether.settings import Settings
from tether_cli.platform.supervisor import FIRST_DELAY_S, LONGEST_DELAY_S, SETTLED_S, Backoff
from tether_cli.platform.up import is_locked, local, locked, ops_ports, parse_address


def test_restarts_wait_longer_and_longer_up_to_a_limit() -> None:
    backoff = Backoff()
    delays = [backoff.after(0.1) for _ in range(8)]
    assert delays[0] == FIRST_DELAY_S
    assert all(later == min(2 * sooner, LONGEST_DELAY_S) for sooner, later in itertools.pairwise(delays))
    assert delays[-1] == LONGEST_DELAY_S


def test_a_long_life_makes_the_next_restart_quick_again() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(0.1)
    assert backoff.after(SETTLED_S) == FIRST_DELAY_S


def test_workers_skip_the_ports_of_dispatcher_and_model_store() -> None:
    ports = ops_ports(Settings(workers=4, model_stores=2))
    assert ports == {
        "modelstore": 8004,
        "modelstore-2": 8006,
        "dispatcher": 8002,
        "worker-1": 8001,
        "worker-2": 8003,
        "worker-3": 8005,
        "worker-4": 8007,
    }
    assert len(set(ops_ports(Settings(workers=64, model_stores=16)).values())) == 81


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), (":8000", ("127.0.0.1", 8000))],
)
def test_an_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "8000", "host:", "host:http", "host:70000", "host:-1"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:8000"):
        parse_address(text)


def test_a_wildcard_address_is_asked_on_loopback() -> None:
    assert local("0.0.0.0") == "127.0.0.1"
    assert local("10.1.2.3") == "10.1.2.3"


def test_one_home_has_one_supervisor(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert not is_locked(home)
    with locked(home):
        assert is_locked(home)
        with pytest.raises(Conflict, match="tether down"), locked(home):
            pass
    assert not is_locked(home)


def test_keys_are_made_once_and_kept(tmp_path: Path) -> None:
    home = Home(tmp_path)
    create_home(home, workers=2)
    before = {path: path.read_bytes() for path in home.keys.iterdir()}
    create_home(home, workers=2)
    assert {path: path.read_bytes() for path in home.keys.iterdir()} == before
    assert all(path.stat().st_mode & 0o077 == 0 for path in before)


def test_a_new_worker_gets_an_identity_in_a_newer_keyset(tmp_path: Path) -> None:
    home = Home(tmp_path)
    create_home(home, workers=1)
    old = load_identity(home.identity("worker-1"))
    create_home(home, workers=3)
    create_home(home, workers=2)  # asking for fewer takes nobody's key away
    keyset = open_keyset(home.keyset.read_bytes(), home.root_public.read_bytes(), now_ms=SystemClock().utc_ms())
    assert keyset.version == 2
    assert {record.name for record in keyset.identities} == {
        "gateway", "dispatcher", "modelstore", "admin", "worker-1", "worker-2", "worker-3",
    }  # fmt: skip
    assert old.kid in {record.kid for record in keyset.identities}


def test_a_lost_root_key_is_not_silently_replaced(tmp_path: Path) -> None:
    home = Home(tmp_path)
    create_home(home, workers=1)
    home.root_key.unlink()
    create_home(home, workers=1)  # nothing is missing, so nothing needs it
    with pytest.raises(ConfigError, match=r"'worker-2' .* restore the root key"):
        create_home(home, workers=2)


def test_every_broker_user_has_its_own_key(tmp_path: Path) -> None:
    home = Home(tmp_path)
    create_home(home, workers=1)
    users = [record.nats for record in broker_logins(home)]
    public = [*users, nats_public_key(home, SYSTEM_USER)]
    assert len(set(public)) == len(public) == 6
    assert all(key.startswith("U") and len(key) == 56 for key in public)


@pytest.mark.parametrize(("version", "flags"), [((2, 12, 0), False), ((2, 14, 0), True), ((2, 15, 0), True)])
def test_a_server_gets_only_words_it_knows(tmp_path: Path, version: tuple[int, int, int], flags: bool) -> None:
    home = Home(tmp_path)
    create_home(home, workers=1)
    text = embedded_text(home, Settings(durability="durable"), version=version, ports=Ports())
    assert ("feature_flags" in text) == flags
    assert "sync_interval: always" in text
    assert "127.0.0.1:-1" in text


def test_an_unfit_server_is_named_with_the_fix() -> None:
    report = judge({"version": "2.11.4", "feature_flags": {"js_ack_fc_v2": True}})
    assert [problem.partition(";")[0] for problem in report.problems] == [
        "nats-server 2.11.4 is older than 2.12.0",
        "JetStream is off",
        "js_ack_fc_v2 is on",
    ]


@pytest.mark.parametrize(
    ("text", "version"), [("nats-server: v2.15.0", (2, 15, 0)), ("2.12.1-beta", (2, 12, 1)), ("no", (0, 0, 0))]
)
def test_versions_are_read_from_what_a_server_prints(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version
