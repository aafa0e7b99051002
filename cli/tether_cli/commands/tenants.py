"""Commands of tenants: create, list, show, set, delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import Url, ask
from tether_cli.output import JsonFlag, print_fields, print_json, print_table, say

Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--models", metavar="PATTERN", help="Upper bound of its keys' models, such as 'fraud-*'; repeatable."),
]
Isolated = Annotated[
    bool | None, typer.Option("--isolated/--shared", help="Give it its own lanes and workers, or share them.")
]
Sealed = Annotated[bool | None, typer.Option("--sealed/--open", help="Encrypt its inputs and outputs, or do not.")]
Weight = Annotated[
    float | None, typer.Option("--weight", metavar="N", min=0.01, help="Weight of its fair share under load.")
]
QueuedJobs = Annotated[
    int | None, typer.Option("--queued-jobs", metavar="N", min=0, help="Maximum unfinished jobs; 0: unlimited.")
]
StoredBytes = Annotated[
    int | None,
    typer.Option("--stored-bytes", metavar="N", min=0, help="Maximum bytes of its model versions; 0: unlimited."),
]
PerMinute = Annotated[
    int | None,
    typer.Option("--requests-per-minute", metavar="N", min=0, help="Maximum requests per minute; 0: unlimited."),
]


def _body(
    models: list[str] | None,
    isolated: bool | None,
    sealed: bool | None,
    weight: float | None,
    quotas: dict[str, int | None],
) -> dict[str, Any]:
    given: dict[str, Any] = {"models": models or None, "isolated": isolated, "sealed": sealed, "weight": weight}
    given["quotas"] = {name: value for name, value in quotas.items() if value is not None} or None
    return {name: value for name, value in given.items() if value is not None}


def create(
    name: Name,
    *,
    models: Models = None,
    isolated: Isolated = None,
    sealed: Sealed = None,
    weight: Weight = None,
    queued_jobs: QueuedJobs = None,
    stored_bytes: StoredBytes = None,
    requests_per_minute: PerMinute = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Restore a removed tenant with its models, grants and jobs.")
    ] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Create a tenant."""
    quotas = {"queued_jobs": queued_jobs, "stored_bytes": stored_bytes, "requests_per_minute": requests_per_minute}
    body = _body(models, isolated, sealed, weight, quotas)
    _print_tenant(
        ask(url, "POST", "/v1/tenants", {"name": name, **body, **({"restore": True} if restore else {})}),
        json_output,
        "made",
    )


def change(
    name: Name,
    *,
    models: Models = None,
    isolated: Isolated = None,
    sealed: Sealed = None,
    weight: Weight = None,
    queued_jobs: QueuedJobs = None,
    stored_bytes: StoredBytes = None,
    requests_per_minute: PerMinute = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Change a tenant; fields that are not given stay."""
    quotas = {"queued_jobs": queued_jobs, "stored_bytes": stored_bytes, "requests_per_minute": requests_per_minute}
    body = _body(models, isolated, sealed, weight, quotas)
    _print_tenant(ask(url, "PATCH", "/v1/tenants", body, last=name), json_output, "changed")


def _print_tenant(tenant: dict[str, Any], json_output: bool, done: str) -> None:
    if json_output:
        print_json(tenant)
    else:
        say(f"tenant {tenant['name']} is {done}")


def listing(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """List tenants."""
    found = ask(url, "GET", "/v1/tenants")
    if json_output:
        print_json(found)
        return
    rows = [
        (entry["name"], entry["models"], *("yes" if entry[mark] else "no" for mark in ("isolated", "sealed")),
         entry["weight"], _quotas(entry))
        for entry in found["tenants"]
    ]  # fmt: skip
    print_table(("NAME", "MODELS", "ISOLATED", "SEALED", "WEIGHT", "QUOTAS"), rows)


def _quotas(entry: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in entry["quotas"].items() if value]


def show(name: Name, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show a tenant and what it uses."""
    found = ask(url, "GET", "/v1/tenants", last=name)
    if json_output:
        print_json(found)
        return
    use = [f"{what}={value}" for what, value in found.get("use", {}).items()]
    print_fields({**found, "quotas": _quotas(found), "use": use})


def delete(name: Name, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Delete a tenant that has no keys. Its models stay, and its name is never reused."""
    _print_tenant(ask(url, "DELETE", "/v1/tenants", last=name), json_output, "removed")
