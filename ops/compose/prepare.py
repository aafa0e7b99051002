"""First step of compose.yaml: make every key once, then give each service a volume with its own keys only.

The root key and all identities stay below /authority, which no running service mounts. A second run changes nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tether.bus.config import write_ops_files
from tether.bus.keys import create_home
from tether.envelope import Role
from tether.home import Home

AUTHORITY = Path("/authority")
SHARE = Path("/share")
WORKERS = 2
OWNER = 10001
"""User and group that the services run as; see the Dockerfile."""


def key_files(home: Home, name: str, role: Role) -> list[Path]:
    """What one service needs: whom to trust, who it is, and its login at the broker."""
    return [home.root_public, home.keyset, home.identity(name), home.nats_seed(role)]


def share(home: Home, name: str, role: Role) -> None:
    """Copy the keys of one service into its volume, readable by that service only."""
    folder = SHARE / name
    folder.chmod(0o700)
    for source in key_files(home, name, role):
        target = folder / source.name
        shutil.copyfile(source, target)
        target.chmod(0o600)
        os.chown(target, OWNER, OWNER)
    os.chown(folder, OWNER, OWNER)


def main() -> None:
    """Make and share the keys."""
    home = Home.at(str(AUTHORITY))
    create_home(home, workers=WORKERS)
    write_ops_files(SHARE / "broker", home)
    for role in (Role.GATEWAY, Role.DISPATCHER, Role.MODELSTORE, Role.ADMIN):
        share(home, role.value, role)
    for number in range(1, WORKERS + 1):
        share(home, f"worker-{number}", Role.WORKER)


if __name__ == "__main__":
    main()
