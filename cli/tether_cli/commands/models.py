"""Models: push, look, promote, roll back, delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import ModelName, Timeout, Url, connect
from tether_cli.output import JsonFlag, print_json, print_table, progress, say

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


def alias(
    name: ModelName,
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="One of them.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--delete", help="Delete it; the version that it stands for stays.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Show what a model's aliases stand for, or delete one; 'promote' sets one."""
    if remove and alias is None:
        raise typer.BadParameter("--delete needs the alias to delete")
    with connect(url) as client:
        if remove and alias is not None:
            client.delete_alias(name, alias)
        known = client.model(name)["aliases"]
        if alias is not None and not remove and alias not in known:
            client.alias(name, alias)  # raises: there is none
        found = [client.alias(name, each) for each in known if alias in (None, each)]
    if json_output:
        print_json({"model": name, "aliases": found})
        return
    if remove:
        say(f"alias {alias} of model {name} is deleted")
    for one in found:
        _told(one, json_output=False)


def delete(
    name: ModelName,
    version: Annotated[int | None, typer.Argument(metavar="[VERSION]", help="One version; else all of them.")] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also delete aliases that stand for what is deleted.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Delete a model, or a version of it. Jobs that still wait for it end with `model_not_found`."""
    with connect(url) as client:
        gone = client.delete_model(name, version, force=force)
    if json_output:
        print_json({"model": name, "deleted": gone})
    elif version is None:
        say(f"model {name} is deleted: {len(gone)} versions; their numbers are never given out again")
    else:
        say(f"version {version} of model {name} is deleted; its number is never given out again")


def rekey(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Store an encrypted model under another key, in the background. Nothing needs to be pushed again."""
    with connect(url) as client:
        told = client.rekey(name)
    if json_output:
        print_json(told)
        return
    typer.echo(f"{told['model']} {told['generation']}")
    say(
        f"{len(told['versions_left'])} versions are being stored under key {told['generation']}; 'tether model show' tells"
    )


def pull(
    name: ModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the files go; made when it is not there.")],
    *,
    version: Annotated[str, typer.Option("--version", metavar="V", help="A version's number or an alias.")] = "latest",
    url: Url = None,
    timeout: Timeout = 600.0,
    json_output: JsonFlag = False,
) -> None:
    """Write the files of a version to a folder."""
    with connect(url, timeout) as client, progress("pulling", None, unit="bytes") as done:
        told = client.pull(name, folder, version=version, progress=done, timeout=timeout)
    if json_output:
        print_json(told)
        return
    for path in told["files"]:
        typer.echo(path)
    say(f"version {told['version']}, {told['size']} bytes")


def listing(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """List models with their versions and aliases."""
    with connect(url) as client:
        models = client.models()
    if json_output:
        print_json({"models": models})
        return
    heading = ("NAME", "VERSIONS", "ALIASES", "READY", "PLATFORM", "BYTES", "RIGHT", "LABELS")
    print_table(heading, [_model_row(entry) for entry in models])


def _model_row(entry: dict[str, Any]) -> tuple[Any, ...]:
    aliases = [f"{alias}={version}" for alias, version in entry.get("aliases", {}).items()]
    ready = "yes" if entry.get("ready") else "no" if entry.get("loaded", True) else "unloaded"
    labels = [f"{name}={value}" for name, value in entry.get("labels", {}).items()]
    columns = (entry["name"], entry.get("versions", []), aliases, ready, entry.get("platform"), entry.get("size"))
    return (*columns, entry.get("right", ""), labels)


def show(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show a model: the signature, files and workers of each version."""
    import json

    with connect(url) as client:
        found = client.model(name)
    if json_output:
        print_json(found)
    else:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


_OUTCOMES = ("equal", "close", "different", "error", "unavailable", "dropped")


def shadows(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show how shadow versions' answers compare with those that callers got, at the gateway that is asked."""
    with connect(url) as client:
        told = client.shadows(name)
    if json_output:
        print_json(told)
        return
    head = ("SHADOW", "COPY OF", *(outcome.upper() for outcome in _OUTCOMES), "LARGEST DIFFERENCE", "LAST ERROR")
    print_table(head, [_shadow_row(one) for one in told])


def _shadow_row(one: dict[str, Any]) -> tuple[Any, ...]:
    what = f"{one['percent']:g} % of {one['alias'] or 'all'}"
    counts = [one[outcome] for outcome in _OUTCOMES]
    return (one["version"], what, *counts, f"{one['largest_difference']:g}", one["last_error"])


def store(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show what is in the store of model chunks, and which are damaged."""
    with connect(url) as client:
        told = client.store()
    _store_told(told, json_output=json_output)


def collect(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Begin to collect chunks that no version names. They are put away first and removed by a later collection."""
    with connect(url) as client:
        told = client.collect()
    _store_told(told, json_output=json_output)


def scrub(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Begin to read and compare every stored chunk; 'tether model store' shows what was found."""
    with connect(url) as client:
        told = client.scrub()
    _store_told(told, json_output=json_output)


def _store_told(told: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(told)
        return
    say(f"{told['stored_bytes']} bytes on disk, {told['named_bytes']} of chunks that versions name")
    say(f"{told['chunks']} chunks, {told['unreferenced_chunks']} of them unreferenced, {len(told['damaged'])} damaged")
    if told["damaged"]:
        print_table(("DAMAGED", "PUSH AGAIN"), [(chunk["digest"], chunk["versions"]) for chunk in told["damaged"]])
