"""Versions in use: promote, roll back, delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import ModelName, Url, connect
from tether_cli.output import JsonFlag, print_json, say

Version = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="The version's number.")]
AliasName = Annotated[str, typer.Option("--alias", metavar="ALIAS", help="The alias to move.")]


def promote(
    name: ModelName,
    version: Version,
    *,
    alias: AliasName = "production",
    canary: Annotated[
        float | None,
        typer.Option("--canary", metavar="PERCENT", help="Give it only this part of the alias's requests."),
    ] = None,
    sticky: Annotated[
        bool, typer.Option("--sticky", help="With --canary: an API key always gets the same version.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Even when no worker holds the version.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Let an alias stand for a version, at once and for everybody."""
    with connect(url) as client:
        told = client.promote(name, version, alias=alias, canary=canary, sticky=sticky, force=force)
    _told(told, json_output=json_output)


def rollback(
    name: ModelName, *, alias: AliasName = "production", url: Url = None, json_output: JsonFlag = False
) -> None:
    """Let an alias stand for what it stood for before."""
    with connect(url) as client:
        told = client.rollback(name, alias=alias)
    _told(told, json_output=json_output)


def _told(told: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(told)
        return
    shares = [f"{share['version']} ({share['weight']:g})" for share in told["split"]] or [str(told["version"])]
    typer.echo(f"{told['model']} {told['alias']} = {', '.join(shares)}")


def delete(
    name: ModelName,
    version: Version,
    *,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Delete a version that no alias stands for. Jobs that still wait for it expire."""
    with connect(url) as client:
        client.delete_version(name, version)
    if json_output:
        print_json({"model": name, "deleted": str(version)})
    else:
        say(f"version {version} of model {name} is deleted; its number is never given out again")
