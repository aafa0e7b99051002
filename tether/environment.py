"""What the environment says that is no setting of a service: for clients, and of the root key. See :mod:`tether.settings`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
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


_SERVICE_LINK = re.compile(r".+(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def is_service_link(variable: str, value: str, known: Collection[str]) -> bool:
    """Whether Kubernetes sets this variable for a Service: ``TETHER_NATS_PORT=tcp://10.0.0.7:4222`` for ``tether-nats``."""
    if variable.endswith("_PORT") and _ADDRESS.fullmatch(value) is not None:
        return True
    return variable not in known and _SERVICE_LINK.fullmatch(variable) is not None


def ignored_variables(prefix: str, known: Collection[str], environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like a setting and is none; one for all that Kubernetes sets."""
    found = {name: value for name, value in sorted(environ.items()) if name.startswith(prefix)}
    links = [name for name, value in found.items() if is_service_link(name, value, known)]
    lines = []
    if links:
        lines.append(
            f"environment: {', '.join(links)} ignored: they are what Kubernetes sets for a Service whose name begins with "
            "'tether'; 'enableServiceLinks: false' in the pod's specification leaves them out"
        )
    for name in found:
        if name not in known and name not in links:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"environment: '{name}' ignored: there is no such setting{hint}")
    return lines
