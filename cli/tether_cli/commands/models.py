"""Commands of models: list, show, promote, roll back, delete and more."""

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
        typer.Option("--canary", metavar="PERCENT", help="Share of the alias's requests for this version."),
    ] = None,
    sticky: Annotated[
        bool, typer.Option("--sticky", help="With --canary: the same API key always gets the same version.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if no worker hosts the version.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Point an alias at a version. Takes effect immediately."""
    with connect(url) as client:
        answer = client.promote(name, version, alias=alias, canary=canary, sticky=sticky, force=force)
    _print_alias(answer, json_output=json_output)


def rollback(
    name: ModelName, *, alias: AliasName = "production", url: Url = None, json_output: JsonFlag = False
) -> None:
    """Point an alias back at its previous version."""
    with connect(url) as client:
        answer = client.rollback(name, alias=alias)
    _print_alias(answer, json_output=json_output)


def _print_alias(answer: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(answer)
        return
    shares = [f"{share['version']} ({share['weight']:g})" for share in answer["split"]] or [str(answer["version"])]
    typer.echo(f"{answer['model']} {answer['alias']} = {', '.join(shares)}")


def alias(
    name: ModelName,
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="Only this alias.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--delete", help="Delete the alias; its version stays.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Show the aliases of a model, or delete one; 'promote' sets one."""
    if remove and alias is None:
        raise typer.BadParameter("--delete needs the name of an alias")
    with connect(url) as client:
        if remove and alias is not None:
            client.delete_alias(name, alias)
        known = client.model(name)["aliases"]
        if alias is not None and not remove and alias not in known:
            client.alias(name, alias)  # raises if the alias does not exist
        found = [client.alias(name, each) for each in known if alias in (None, each)]
    if json_output:
        print_json({"model": name, "aliases": found})
        return
    if remove:
        say(f"alias {alias} of model {name} is deleted")
    for one in found:
        _print_alias(one, json_output=False)


def delete(
    name: ModelName,
    version: Annotated[int | None, typer.Argument(metavar="[VERSION]", help="Only this version; default: all.")] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also delete aliases that point at deleted versions.")] = False,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Delete a model, or one of its versions. Its queued jobs fail with `model_not_found`."""
    with connect(url) as client:
        gone = client.delete_model(name, version, force=force)
    if json_output:
        print_json({"model": name, "deleted": gone})
    elif version is None:
        say(f"model {name} is deleted: {len(gone)} versions; their numbers are never reused")
    else:
        say(f"version {version} of model {name} is deleted; its number is never reused")


def rekey(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Re-encrypt a model's stored files under a new key, in the background. No push is needed."""
    with connect(url) as client:
        answer = client.rekey(name)
    if json_output:
        print_json(answer)
        return
    typer.echo(f"{answer['model']} {answer['generation']}")
    say(
        f"{len(answer['versions_left'])} versions are being re-encrypted under key {answer['generation']}; "
        "see 'tether model show'"
    )


def pull(
    name: ModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder for the files; created if missing.")],
    *,
    version: Annotated[str, typer.Option("--version", metavar="V", help="A version's number or an alias.")] = "latest",
    url: Url = None,
    timeout: Timeout = 600.0,
    json_output: JsonFlag = False,
) -> None:
    """Download the files of a version to a folder."""
    with connect(url, timeout) as client, progress("pulling", None, unit="bytes") as done:
        answer = client.pull(name, folder, version=version, progress=done, timeout=timeout)
    if json_output:
        print_json(answer)
        return
    for path in answer["files"]:
        typer.echo(path)
    say(f"version {answer['version']}, {answer['size']} bytes")


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
    """Compare shadow outputs with the outputs that callers received, as counted by the gateway asked."""
    with connect(url) as client:
        answer = client.shadows(name)
    if json_output:
        print_json(answer)
        return
    head = ("SHADOW", "COPY OF", *(outcome.upper() for outcome in _OUTCOMES), "LARGEST DIFFERENCE", "LAST ERROR")
    print_table(head, [_shadow_row(one) for one in answer])


def _shadow_row(one: dict[str, Any]) -> tuple[Any, ...]:
    what = f"{one['percent']:g} % of {one['alias'] or 'all'}"
    counts = [one[outcome] for outcome in _OUTCOMES]
    return (one["version"], what, *counts, f"{one['largest_difference']:g}", one["last_error"])


def store(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show the size of the chunk store, and its damaged chunks."""
    with connect(url) as client:
        answer = client.store()
    _print_store(answer, json_output=json_output)


def collect(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Start a garbage collection. Unreferenced chunks are marked first and removed by a later collection."""
    with connect(url) as client:
        answer = client.collect()
    _print_store(answer, json_output=json_output)


def scrub(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """Start to verify every stored chunk; 'tether model store' shows the findings."""
    with connect(url) as client:
        answer = client.scrub()
    _print_store(answer, json_output=json_output)


def _print_store(answer: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(answer)
        return
    say(f"{answer['stored_bytes']} bytes on disk, {answer['named_bytes']} of chunks that versions name")
    say(
        f"{answer['chunks']} chunks, {answer['unreferenced_chunks']} of them unreferenced, {len(answer['damaged'])} damaged"
    )
    if answer["damaged"]:
        print_table(("DAMAGED", "PUSH AGAIN"), [(chunk["digest"], chunk["versions"]) for chunk in answer["damaged"]])
