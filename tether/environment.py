"""What the environment says that is no setting of a service: for clients, and of the root key. See :mod:`tether.settings`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

HOME_VARIABLE = "TETHER_HOME"
ROOT_PASSPHRASE = "TETHER_ROOT_PASSPHRASE"  # noqa: S105 - the name, not the passphrase
OTHER_VARIABLES = ("TETHER_API_KEY", "TETHER_URL", ROOT_PASSPHRASE)
"""Read by the client and the command line, not settings of a service."""


@dataclass(frozen=True)
class ClientEnvironment:
    """What the environment tells a client; empty where it tells nothing."""

    url: str
    api_key: str
    home: str


def client_environment(environ: Mapping[str, str] | None = None) -> ClientEnvironment:
    """Read TETHER_URL, TETHER_API_KEY and TETHER_HOME."""
    environ = os.environ if environ is None else environ
    return ClientEnvironment(
        environ.get("TETHER_URL", ""), environ.get("TETHER_API_KEY", ""), environ.get(HOME_VARIABLE, "")
    )


def root_passphrase(environ: Mapping[str, str] | None = None) -> str:
    """TETHER_ROOT_PASSPHRASE, which opens a locked root key; empty when it is not set."""
    return (os.environ if environ is None else environ).get(ROOT_PASSPHRASE, "")


def without_passphrase(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a service, which has no business with the root key."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if name != ROOT_PASSPHRASE}
