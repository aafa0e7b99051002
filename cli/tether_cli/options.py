"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tether.client import Client

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The gateway; else TETHER_URL, else the platform of TETHER_HOME, else http://127.0.0.1:8000. "
        "The key is TETHER_API_KEY, else admin.key of TETHER_HOME.",
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Longest time for one request.")]
Within = Annotated[
    float | None,
    typer.Option("--within", metavar="SECONDS", min=0, help="Longest wait for the end; without it, until the end."),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="INPUTS",
        help="Inputs: a .json file (OIP body, or {name: nested list}), .npy (the only input), .npz (by name), or - for "
        "standard input.",
    ),
]
Version = Annotated[str | None, typer.Option("--version", metavar="VERSION", help="Version or alias; else latest.")]
Output = Annotated[str | None, typer.Option("--output", metavar="FILE.npz", help="Write the outputs to this file.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


def connect(url: str | None, timeout: float = 30.0) -> Client:
    from tether.client import Client

    return Client(url, timeout=timeout, tries=4)


def ask(
    url: str | None, method: str, path: str, body: dict[str, Any] | None = None, *, last: str = ""
) -> dict[str, Any]:
    """The JSON object that the gateway answers; ``last`` is added to ``path`` as one segment."""
    from tether import client_flows

    whole = client_flows.below(path, last) if last else path
    with connect(url) as client:
        found: dict[str, Any] = client.run(lambda policy: client_flows.ask(policy, method, whole, body))
    return found
