"""Commands that speak to a running platform; the ones about jobs are in :mod:`tether_cli.commands_jobs`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli import (
    commands_audit,
    commands_config,
    commands_jobs,
    commands_keys,
    commands_models,
    commands_sessions,
    commands_tenants,
)
from tether_cli.options import ModelName, Timeout, Url, connect
from tether_cli.output import JsonFlag, print_json, print_table, progress, say


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(commands_jobs.submit)
    app.command()(commands_jobs.infer)
    groups: tuple[tuple[str, str, dict[str, Any]], ...] = (
        (
            "job",
            "Durable jobs: list, look, wait, cancel.",
            {
                "list": commands_jobs.listing,
                "get": commands_jobs.get,
                "wait": commands_jobs.wait,
                "cancel": commands_jobs.cancel,
            },
        ),
        (
            "model",
            "Models: push, list, show, promote, roll back, delete.",
            {
                "push": model_push,
                "list": model_list,
                "show": model_show,
                "promote": commands_models.promote,
                "rollback": commands_models.rollback,
                "delete": commands_models.delete,
            },
        ),
        (
            "key",
            "API keys: create, list, revoke, rotate.",
            {
                "create": commands_keys.create,
                "list": commands_keys.listing,
                "revoke": commands_keys.revoke,
                "rotate": commands_keys.rotate,
            },
        ),
        ("session", "Session tokens: create.", {"create": commands_sessions.create}),
        (
            "tenant",
            "Tenants: create, list, show, set, delete.",
            {
                "create": commands_tenants.create,
                "list": commands_tenants.listing,
                "show": commands_tenants.show,
                "set": commands_tenants.change,
                "delete": commands_tenants.delete,
            },
        ),
        (
            "audit",
            "The audit log: tail, search, verify, export.",
            {
                "tail": commands_audit.tail,
                "search": commands_audit.search,
                "verify": commands_audit.verify,
                "export": commands_audit.export,
            },
        ),
        (
            "config",
            "Settings: show, check, schema.",
            {"show": commands_config.show, "check": commands_config.check, "schema": commands_config.schema},
        ),
    )
    for name, text, commands in groups:
        group = typer.Typer(name=name, help=text, no_args_is_help=True, rich_markup_mode=None)
        for command, function in commands.items():
            group.command(command)(function)
        app.add_typer(group)


def model_push(
    name: ModelName,
    path: Annotated[str, typer.Argument(metavar="FILE.onnx", help="The model's file.")],
    *,
    max_batch_size: Annotated[
        int | None, typer.Option("--max-batch-size", metavar="N", min=0, help="Most rows in one run; 0: no batches.")
    ] = None,
    max_delay_ms: Annotated[
        float | None, typer.Option("--max-delay-ms", metavar="MS", min=0, help="How long a job may wait for company.")
    ] = None,
    url: Url = None,
    timeout: Timeout = 600.0,
    json_output: JsonFlag = False,
) -> None:
    """Make a file the next version of a model. Only what the store does not have is sent."""
    from pathlib import Path

    size = Path(path).stat().st_size if Path(path).is_file() else None
    with connect(url, timeout) as client, progress("pushing", size, unit="bytes") as done:
        told = client.push(
            name, path, max_batch_size=max_batch_size, max_delay_ms=max_delay_ms, progress=done, timeout=timeout
        )
    if json_output:
        print_json(told)
        return
    typer.echo(f"{told['name']} {told['version']}")
    say(f"{told.get('size')} bytes, {told.get('stored_bytes')} of them sent; the rest was there already")


def model_list(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """List models with their versions and aliases."""
    with connect(url) as client:
        models = client.models()
    if json_output:
        print_json({"models": models})
        return
    heading = ("NAME", "VERSIONS", "ALIASES", "READY", "PLATFORM", "BYTES")
    print_table(heading, [_model_row(entry) for entry in models])


def _model_row(entry: dict[str, Any]) -> tuple[Any, ...]:
    aliases = [f"{alias}={version}" for alias, version in entry.get("aliases", {}).items()]
    ready = "yes" if entry.get("ready") else "no"
    return (entry["name"], entry.get("versions", []), aliases, ready, entry.get("platform"), entry.get("size"))


def model_show(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Show a model: the signature, files and workers of each version."""
    import json

    with connect(url) as client:
        found = client.model(name)
    if json_output:
        print_json(found)
    else:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
