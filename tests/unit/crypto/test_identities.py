"""Adding, rotating, revoking and renewing identities on a home; whose files are let near."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tether.bus.key_value.keyset_sync import TrustedKeyset
from tether.bus.session import prepare
from tether.crypto import Identity, Role, is_locked, lock_root_key, sign_keyset, unlock_root_key
from tether.errors import ConfigError, Conflict, InvalidRequest, KeyRevoked, KeysetError, NotFound
from tether.identity import keyset_editor
from tether.identity.keys import DAY_MS, RootKey, broker_logins, create_home, read_keyset
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, check_folder, load_identity, read_secret, write_secret
from tether.settings import Settings


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    create_home(made, workers=1)
    return made


@pytest.fixture
def root(home: Home) -> RootKey:
    return RootKey(home.root_key)


def own(home: Home, name: str) -> Identity:
    return load_identity(home.identity(name))


def states(home: Home, name: str) -> list[str]:
    return [row.state for row in keyset_editor.listing(home) if row.name == name]


def test_an_added_identity_has_keys_a_login_and_a_place_in_the_keyset(home: Home, root: RootKey) -> None:
    made = keyset_editor.add(home, root, "worker-7", Role.WORKER, tenant="acme", valid_days=3)
    assert (made.kid, made.role, made.tenant) == (own(home, "worker-7").kid, Role.WORKER, "acme")
    assert made.expires_at - made.not_before == 3 * DAY_MS
    assert made.nats in {record.nats for record in broker_logins(home)}
    assert read_keyset(home).version == 2
    create_home(home, workers=1)  # and it changes nothing of it
    assert read_keyset(home).version == 2


@pytest.mark.parametrize("name", ["", "system", "Worker", "a.b", "a b", "../x", "worker>", "x" * 65])
def test_a_name_is_one_token(home: Home, root: RootKey, name: str) -> None:
    with pytest.raises(InvalidRequest):
        keyset_editor.add(home, root, name, Role.WORKER)
    assert read_keyset(home).version == 1


def test_a_name_is_taken_once_and_only_workers_have_a_tenant(home: Home, root: RootKey) -> None:
    with pytest.raises(Conflict, match="rotate"):
        keyset_editor.add(home, root, "worker-1", Role.WORKER)
    with pytest.raises(InvalidRequest, match="worker"):
        keyset_editor.add(home, root, "gateway-2", Role.GATEWAY, tenant="acme")


def test_a_rotated_identity_keeps_login_box_and_tenant_while_its_old_key_ages(home: Home, root: RootKey) -> None:
    first = keyset_editor.add(home, root, "worker-7", Role.WORKER, tenant="acme")
    before = own(home, "worker-7")
    made = keyset_editor.rotate(home, root, "worker-7", grace_s=60)
    after = own(home, "worker-7")
    assert (made.kid, made.nats, made.tenant) == (after.kid, first.nats, "acme")
    assert (after.kid != before.kid, after.box_seed) == (True, before.box_seed)
    old = next(record for record in read_keyset(home).identities if record.kid == before.kid)
    assert old.expires_at - made.not_before == 60_000
    assert states(home, "worker-7") == ["outgoing", "current"]
    assert len(broker_logins(home)) == 6
    with pytest.raises(NotFound, match="identity list"):
        keyset_editor.rotate(home, root, "nobody")


def test_a_revoked_identity_counts_no_more_and_its_files_are_gone(home: Home, root: RootKey) -> None:
    kid = own(home, "worker-1").kid
    (gone,) = keyset_editor.revoke(home, root, "worker-1")
    assert gone.kid == kid
    assert not home.identity("worker-1").exists()
    assert not home.nats_seed("worker-1").exists()
    assert states(home, "worker-1") == ["revoked"]
    assert "worker-1" not in {record.name for record in broker_logins(home)}
    with pytest.raises(ConfigError, match="identity add worker-1 --role worker"):
        create_home(home, workers=1)
    with pytest.raises(KeyRevoked):
        prepare(Settings(), home, "worker-1")
    keyset_editor.add(home, root, "worker-1", Role.WORKER)
    create_home(home, workers=1)
    assert own(home, "worker-1").kid != kid


def test_a_revoked_key_does_not_come_back_with_its_file(home: Home, root: RootKey) -> None:
    file = home.identity("worker-1").read_bytes()
    keyset_editor.revoke(home, root, "worker-1")
    write_secret(home.identity("worker-1"), file)
    with pytest.raises(KeyRevoked):
        prepare(Settings(), home, "worker-1")
    keyset_editor.add(home, root, "worker-2", Role.WORKER)
    with pytest.raises(ConfigError, match="revoked"):
        create_home(home, workers=1)


def test_one_key_of_a_name_can_be_revoked_alone(home: Home, root: RootKey) -> None:
    old = own(home, "gateway").kid
    keyset_editor.rotate(home, root, "gateway")
    (gone,) = keyset_editor.revoke(home, root, old.hex()[:12])
    assert gone.kid == old
    assert states(home, "gateway") == ["current", "revoked"]
    assert home.identity("gateway").exists()
    assert home.nats_seed("gateway").exists()
    with pytest.raises(NotFound):
        keyset_editor.revoke(home, root, "0" * 32)


def test_an_expired_keyset_is_renewed_with_every_current_key(home: Home, root: RootKey) -> None:
    keyset_editor.rotate(home, root, "gateway", grace_s=0)
    keyset = read_keyset(home)
    now = SystemClock().utc_ms()
    expired = sign_keyset(
        home.root_key.read_bytes(), type(keyset)(keyset.version, 0, now - 1, keyset.identities, keyset.revoked)
    )
    write_secret(home.keyset, expired)
    with pytest.raises(KeysetError, match="identity renew"):
        read_keyset(home)
    made = keyset_editor.renew(home, root, valid_days=2)
    assert (made.version, read_keyset(home).version) == (keyset.version + 1,) * 2
    assert states(home, "gateway") == ["expired", "current"]
    current = {record.name: record.expires_at for record in made.identities}
    assert set(current.values()) == {made.expires_at}


def test_an_exported_home_holds_one_identity_and_no_root_key(home: Home, root: RootKey, tmp_path: Path) -> None:
    keyset_editor.add(home, root, "worker-7", Role.WORKER)
    keyset_editor.add(home, root, "gateway-2", Role.GATEWAY)
    for name, stem in (("worker-7", "worker-7"), ("gateway-2", "gateway")):
        target = Home(keyset_editor.export(home, name, tmp_path / name))
        assert {path.name for path in target.keys.iterdir()} == {
            "root.pub", "keyset", f"{stem}.identity", f"nats-{stem}.seed",
        }  # fmt: skip
        bus, _ = prepare(Settings(), target, stem)
        assert bus.signer.name == name


# the root key


def test_a_root_key_elsewhere_is_needed_for_changes_only(tmp_path: Path) -> None:
    home, stick = Home(tmp_path / "home"), RootKey(tmp_path / "stick" / "root.key")
    create_home(home, workers=1, root=stick)
    assert not home.root_key.exists()
    create_home(home, workers=1)
    with pytest.raises(ConfigError, match="restore the root key"):
        create_home(home, workers=2)
    create_home(home, workers=2, root=stick)
    assert read_keyset(home).version == 2
    other = RootKey(tmp_path / "other.key")
    write_secret(other.path, os.urandom(32))
    with pytest.raises(ConfigError, match="is not the root key"):
        keyset_editor.rotate(home, other, "gateway")


def test_a_locked_root_key_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    home = Home(tmp_path)
    create_home(home, workers=1, root=RootKey(home.root_key, lambda: "correct horse"), lock=True)
    data = home.root_key.read_bytes()
    assert is_locked(data)
    create_home(home, workers=1)  # starting needs no passphrase
    for asked in ("wrong", ""):
        with pytest.raises(ConfigError, match="passphrase"):
            keyset_editor.rotate(home, RootKey(home.root_key, partial(str, asked)), "gateway")
    with pytest.raises(ConfigError, match="TETHER_ROOT_PASSPHRASE"):
        keyset_editor.rotate(home, RootKey(home.root_key), "gateway")
    assert read_keyset(home).version == 1
    keyset_editor.rotate(home, RootKey(home.root_key, lambda: "correct horse"), "gateway")
    assert read_keyset(home).version == 2


def test_a_damaged_root_key_is_said_to_be_damaged() -> None:
    locked = lock_root_key(bytes(32), "p")
    assert unlock_root_key(locked, "p") == bytes(32)
    for damaged in (locked[:-1], locked[:25], locked + b"x", locked[:19] + b"\xff" * 8 + locked[27:]):
        with pytest.raises(ConfigError, match="damaged"):
            unlock_root_key(damaged, "p")
    with pytest.raises(ConfigError, match="does not decrypt"):
        unlock_root_key(locked[:-1] + bytes([locked[-1] ^ 1]), "p")


# what was seen


def test_a_keyset_that_was_seen_is_not_replaced_by_an_older_one(home: Home, root: RootKey) -> None:
    older = TrustedKeyset.load(home)
    keyset_editor.rotate(home, root, "gateway")
    newer = TrustedKeyset.load(home)
    older.save(home)
    assert TrustedKeyset.load(home).keyset.version == 2
    with pytest.raises(KeysetError) as caught:
        newer.newer(older.data, SystemClock().utc_ms())
    assert caught.value.reason == "older"


def test_where_keys_cannot_be_written_what_was_seen_is_kept_beside_them(home: Home, root: RootKey) -> None:
    older = home.keyset.read_bytes()
    keyset_editor.rotate(home, root, "gateway")
    newer = TrustedKeyset.load(home)
    write_secret(home.keyset, older)
    lock = home.keys / ".lock"
    lock.unlink()
    lock.mkdir()  # what cannot be opened for writing, whoever runs the test
    newer.save(home)
    assert home.keyset.read_bytes() == older
    assert TrustedKeyset.load(home).keyset.version == 2


# whose files are let near


@pytest.mark.parametrize("name", ["root.key", "gateway.identity", "nats-gateway.seed"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_file_that_others_may_touch_is_refused_with_the_fix(home: Home, name: str, mode: int) -> None:
    path = home.keys / name
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        read_secret(path)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720])
def test_a_folder_of_keys_that_others_may_write_is_refused_with_the_fix(home: Home, mode: int) -> None:
    for folder in (home.keys, home.root):
        folder.chmod(mode)
        with pytest.raises(ConfigError, match=f"chmod go-w {folder}"):
            prepare(Settings(), home, "gateway")
        folder.chmod(0o755)
        prepare(Settings(), home, "gateway")


def test_another_users_file_or_folder_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)
    with pytest.raises(ConfigError, match="chown"):
        read_secret(home.identity("gateway"))
    if os.getuid() == 0:  # a folder of root's is nobody's trap, so make it another's
        os.chown(home.keys, 1234, -1)
    with pytest.raises(ConfigError, match="chown"):
        check_folder(home.keys)
