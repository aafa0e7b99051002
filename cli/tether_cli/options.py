"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tether.client.blocking import Client
    from tether.identity.keys import RootKey
    from tether.process.data_dir import Home

DataDir = Annotated[str | None, typer.Option("--data-dir", metavar="DIR", help="Data directory; default: TETHER_HOME.")]
Nats = Annotated[str | None, typer.Option("--nats", metavar="URL", help="Use this broker instead of an embedded one.")]
RootKeyPath = Annotated[
    Path | None, typer.Option("--root-key", metavar="FILE", help="Path of the root key; default: keys/root.key.")
]

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="URL of the gateway; else TETHER_URL, else the platform of TETHER_HOME, else http://127.0.0.1:8000. "
        "The key is TETHER_API_KEY, else admin.key of TETHER_HOME.",
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Timeout of one request.")]
Within = Annotated[
    float | None,
    typer.Option("--within", metavar="SECONDS", min=0, help="Maximum wait for the jobs to finish; default: unlimited."),
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of the model; tenant/model for another tenant's.")
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="INPUTS",
        help="Inputs: a .json file (OIP body, or {name: nested list}), .npy (the only input), .npz (by name), - for "
        "standard input, or the JSON itself.",
    ),
]
Version = Annotated[str | None, typer.Option("--version", metavar="VERSION", help="Version or alias; default: latest.")]
Output = Annotated[str | None, typer.Option("--output", metavar="FILE.npz", help="Write the outputs to this file.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


def root_key(home: Home, path: Path | None, *, confirm: bool = False) -> RootKey:
    """Return the root key of a home; its passphrase comes from TETHER_ROOT_PASSPHRASE or a prompt."""
    import sys

    from tether.environment import root_passphrase
    from tether.errors import ConfigError
    from tether.identity.keys import RootKey

    def ask() -> str:
        if given := root_passphrase():
            return given
        if not sys.stdin.isatty():
            raise ConfigError(
                "no terminal to ask for the root key's passphrase; set TETHER_ROOT_PASSPHRASE", field="passphrase"
            )
        return str(typer.prompt("Passphrase of the root key", hide_input=True, err=True, confirmation_prompt=confirm))

    return RootKey(home.root_key if path is None else path.absolute(), ask)


def connect(url: str | None, timeout: float = 30.0) -> Client:
    from tether.client.blocking import Client

    return Client(url, timeout=timeout, tries=4)


def ask(
    url: str | None, method: str, path: str, body: dict[str, Any] | None = None, *, last: str = ""
) -> dict[str, Any]:
    """Return the JSON object that the gateway answers; ``last`` is appended to ``path`` as one segment."""
    from tether.client import operations

    whole = operations.below(path, last) if last else path
    with connect(url) as client:
        found: dict[str, Any] = client.run(lambda policy: operations.ask(policy, method, whole, body))
    return found
