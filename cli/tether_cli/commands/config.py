"""Commands of the settings: show the effective values, check the files, print the JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tether_cli.output import JsonFlag, print_fields, print_json, say

Service = Annotated[
    str, typer.Argument(metavar="SERVICE", help="gateway, dispatcher, worker, modelstore or broker; default: gateway.")
]
Environment = Annotated[
    str | None, typer.Option("--environment", metavar="NAME", help="Profile of the files to read: dev, prod or local.")
]


def _checked(service: str) -> str:
    from tether.settings import SERVICES

    if service not in SERVICES:
        raise typer.BadParameter(f"unknown service '{service}'; expected one of {', '.join(SERVICES)}")
    return service


def show(service: Service = "gateway", *, environment: Environment = None, json_output: JsonFlag = False) -> None:
    """Print every setting of a service with its effective value."""
    from tether import settings

    found = settings.as_dict(settings.load(_checked(service), overrides={"environment": environment}))
    if json_output:
        print_json(found)
    else:
        print_fields(found)


def check(*, environment: Environment = None, json_output: JsonFlag = False) -> None:
    """Check files and variables of every service; exit status 1 at the first error."""
    from tether import settings

    for service in settings.SERVICES:
        settings.load(service, overrides={"environment": environment})
    if json_output:
        print_json({"ok": True, "services": list(settings.SERVICES)})
    else:
        say(f"the settings of {', '.join(settings.SERVICES)} are valid")


def schema(*, json_output: JsonFlag = False) -> None:
    """Print the JSON Schema of a configuration file."""
    from tether import settings

    if json_output:
        print_json(settings.schema())
    else:
        typer.echo(json.dumps(settings.schema(), indent=2))
