"""Who owns a model, and what other tenants may do with it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import ModelName, Url, connect
from tether_cli.output import JsonFlag, print_json, print_table, say

Grantee = Annotated[
    str, typer.Option("--tenant", metavar="TENANT", help="Whom it is about; '*': every tenant there is and will be.")
]


def grant(
    name: ModelName,
    *,
    tenant: Grantee,
    write: Annotated[
        bool,
        typer.Option(
            "--write/--use",
            help="Run the model; or with --write also push to it, change, load, unload and delete it and read its files.",
        ),
    ] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Let another tenant use a model that is yours, or write to it."""
    with connect(url) as client:
        told = client.grants.grant(name, tenant, "write" if write else "use")
    _told(told, json_output=json_output)


def revoke(name: ModelName, *, tenant: Grantee, url: Url = None, json_output: JsonFlag = False) -> None:
    """Take back what a tenant was granted. What it has queued still ends."""
    with connect(url) as client:
        told = client.grants.revoke(name, tenant)
    _told(told, json_output=json_output)


def grants(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show which tenant owns a model, and what it granted to others."""
    with connect(url) as client:
        told = client.grants.show(name)
    _told(told, json_output=json_output)


def hand_over(
    name: ModelName,
    *,
    tenant: Annotated[str, typer.Option("--tenant", metavar="TENANT", help="The tenant that is to own it.")],
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Let another tenant own a model; for administrators."""
    with connect(url) as client:
        told = client.grants.hand_over(name, tenant)
    _told(told, json_output=json_output)


def _told(told: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(told)
        return
    rows = [(told["owner"], "own"), *((entry["tenant"], entry["right"]) for entry in told["grants"])]
    print_table(("TENANT", "RIGHT"), rows)
    say(f"model {told['model']}, revision {told['revision']}")
