"""An export that was cut is not taken for a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tether.audit import Record, write_record
from tether.errors import ConfigError, KeysetError
from tether.identity.keys import create_home
from tether.process.data_dir import Home, read_secret
from tether.settings import Settings
from tether_cli.audit_queries import KEYSET, verify_file


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    create_home(made, workers=1)
    return made


def test_an_export_that_ends_within_its_keysets_is_refused(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "export"
    keyset = write_record(Record(0, KEYSET, 0, KEYSET, home.keyset.read_bytes()))
    path.write_bytes(keyset * 2)
    assert not verify_file(Settings(), home, path).blocks
    path.write_bytes((keyset * 2)[:-9])
    with pytest.raises(ConfigError, match=f"in the middle of a block, after byte {len(keyset)}"):
        verify_file(Settings(), home, path)
    path.write_bytes(b"")
    with pytest.raises(KeysetError, match="no keyset"):
        verify_file(Settings(), home, path)


def test_a_missing_root_key_is_looked_for_elsewhere(home: Home) -> None:
    home.root_key.unlink()
    with pytest.raises(ConfigError, match="--root-key"):
        read_secret(home.root_key)
