"""Commands of model ownership: grants to other tenants, change of owner."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import ModelName, Url, connect
from tether_cli.output import JsonFlag, print_json, print_table, say

Grantee = Annotated[
    str, typer.Option("--tenant", metavar="TENANT", help="Tenant of the grant; '*': every present and future tenant.")
]


def grant(
    name: ModelName,
    *,
    tenant: Grantee,
    write: Annotated[
        bool,
        typer.Option(
            "--write/--use",
            help="Right to run the model; --write adds push, change, load, unload, delete and reading its files.",
        ),
    ] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Grant another tenant the right to use your model, or to write to it."""
    with connect(url) as client:
        answer = client.grants.grant(name, tenant, "write" if write else "use")
    _print_owner(answer, json_output=json_output)


def revoke(name: ModelName, *, tenant: Grantee, url: Url = None, json_output: JsonFlag = False) -> None:
    """Revoke a tenant's grant. Its queued jobs still run."""
    with connect(url) as client:
        answer = client.grants.revoke(name, tenant)
    _print_owner(answer, json_output=json_output)


def grants(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show which tenant owns a model, and the grants to other tenants."""
    with connect(url) as client:
        answer = client.grants.show(name)
    _print_owner(answer, json_output=json_output)


def hand_over(
    name: ModelName,
    *,
    tenant: Annotated[str, typer.Option("--tenant", metavar="TENANT", help="The new owner.")],
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Transfer a model to another tenant. For administrators."""
    with connect(url) as client:
        answer = client.grants.hand_over(name, tenant)
    _print_owner(answer, json_output=json_output)


def _print_owner(answer: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(answer)
        return
    rows = [(answer["owner"], "own"), *((entry["tenant"], entry["right"]) for entry in answer["grants"])]
    print_table(("TENANT", "RIGHT"), rows)
    say(f"model {answer['model']}, revision {answer['revision']}")
