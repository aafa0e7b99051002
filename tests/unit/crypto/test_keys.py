"""The keys of a home: what is made, what is kept, what an older version left behind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import nkeys
import pytest

from tether.crypto import MessageType, sign_keyset
from tether.errors import ConfigError
from tether.identity.keys import broker_logins, create_home, nats_public_key, read_keyset
from tether.process.data_dir import Home, write_secret


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    create_home(made, workers=2)
    return made


def rewrite(home: Home, **changes: object) -> None:
    """Sign the home's keyset with every record changed."""
    keyset = read_keyset(home)
    records = tuple(msgspec.structs.replace(record, **changes) for record in keyset.identities)
    write_secret(
        home.keyset, sign_keyset(home.root_key.read_bytes(), msgspec.structs.replace(keyset, identities=records))
    )


def as_0_1(home: Home) -> None:
    """Make it look as 0.1 left it: one login for all workers, and a keyset that names no logins."""
    rewrite(home, nats="")
    for name in ("worker-1", "worker-2"):
        home.nats_seed(name).unlink()
    write_secret(home.nats_seed("worker"), nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER))


def test_the_keyset_names_each_identitys_login(home: Home) -> None:
    records = read_keyset(home).identities
    assert {record.name: record.nats for record in records} == {
        name: nats_public_key(home, name)
        for name in ("gateway", "dispatcher", "modelstore", "admin", "worker-1", "worker-2")
    }


def test_a_home_of_0_1_gets_the_logins_it_lacks_and_keeps_its_identities(home: Home) -> None:
    kids = {record.kid for record in read_keyset(home).identities}
    as_0_1(home)
    with pytest.raises(ConfigError, match="tether init"):
        broker_logins(home)
    create_home(home, workers=2)
    assert {record.kid for record in broker_logins(home)} == kids
    assert read_keyset(home).version == 2
    assert not home.nats_seed("worker").exists()


def test_a_home_of_0_1_without_its_root_key_is_told_what_to_do(home: Home) -> None:
    as_0_1(home)
    home.root_key.unlink()
    with pytest.raises(ConfigError, match="restore the root key"):
        create_home(home, workers=2)


def test_a_keyset_that_knows_fewer_message_types_is_signed_anew(home: Home) -> None:
    rewrite(home, types=(MessageType.INFER,))
    create_home(home, workers=2)
    keyset = read_keyset(home)
    assert keyset.version == 2
    assert all(len(record.types) > 1 for record in keyset.identities)
    create_home(home, workers=2)
    assert read_keyset(home).version == 2
