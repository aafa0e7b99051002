"""First step of compose.yaml: make every key once, then give each service a volume with its own keys only.

The root key and all identities stay below /authority, which no running service mounts. A second run changes nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tether.broker.nats_config import write_ops_files
from tether.crypto import Role
from tether.identity.keys import create_home
from tether.process.data_dir import Home

AUTHORITY = Path("/authority")
SHARE = Path("/share")
WORKERS = 2
OWNER = 10001
"""User and group that the services run as; see the Dockerfile."""


def key_files(home: Home, name: str) -> list[Path]:
    """What one service needs: whom to trust, who it is, and its login at the broker."""
    return [home.root_public, home.keyset, home.identity(name), home.nats_seed(name)]


def own(path: Path, mode: int) -> None:
    """Give a file or folder to the services' user alone."""
    path.chmod(mode)
    os.chown(path, OWNER, OWNER)


def share(home: Home, name: str, folder: Path) -> None:
    """Copy the keys of one service into its folder, readable by that service only."""
    folder.mkdir(exist_ok=True)
    for source in key_files(home, name):
        target = folder / source.name
        shutil.copyfile(source, target)
        own(target, 0o600)
    own(folder, 0o700)


def main() -> None:
    """Make and share the keys."""
    home = Home.at(str(AUTHORITY))
    create_home(home, workers=WORKERS)
    write_ops_files(SHARE / "broker", home)
    for role in (Role.GATEWAY, Role.DISPATCHER, Role.MODELSTORE):
        share(home, role.value, SHARE / role.value)
    for number in range(1, WORKERS + 1):
        name = f"worker-{number}"
        share(home, name, SHARE / name)
    own(SHARE / "admin", 0o700)  # a whole home: the administrator's key is written there
    share(home, Role.ADMIN.value, SHARE / "admin" / "keys")


if __name__ == "__main__":
    main()
