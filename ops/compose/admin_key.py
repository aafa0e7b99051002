"""Print the administrator's API key of the platform in compose.yaml; the first run makes it."""

from __future__ import annotations

import asyncio

from tether.process.data_dir import Home, read_secret
from tether.settings import load
from tether_cli.platform.up import provide_admin_key


def main() -> None:
    """Make the key known to the platform and print it."""
    settings = load("broker")
    home = Home.at(settings.home)
    asyncio.run(provide_admin_key(settings, home))
    print(read_secret(home.admin_key).decode().strip())


if __name__ == "__main__":
    main()
