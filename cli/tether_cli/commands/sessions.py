"""Sessions: create."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.commands.keys import seconds
from tether_cli.options import Url, ask
from tether_cli.output import JsonFlag, print_json, say


def create(
    *,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="DURATION", help="How long the token is valid, at most 1h.")
    ] = "15m",
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="SCOPE", help="Only these of the key's scopes; repeatable."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", metavar="PATTERN", help="Only these of the key's models; repeatable."),
    ] = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Create a short-lived token with the API key's rights, or fewer, and print it."""
    body: dict[str, Any] = {"ttl_s": seconds(ttl)}
    body.update({name: value for name, value in (("scopes", scopes), ("models", models)) if value})
    made = ask(url, "POST", "/v1/sessions", body)
    if json_output:
        print_json(made)
        return
    say(f"session {made['id']} of {made['tenant']} is valid until {made['expires_at']}")
    typer.echo(made["token"])
