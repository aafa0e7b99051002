"""Registers the command groups that use a running platform."""

from __future__ import annotations

from typing import Any

import typer

from tether_cli.commands import audit as commands_audit
from tether_cli.commands import config as commands_config
from tether_cli.commands import grants, push, sessions
from tether_cli.commands import jobs as commands_jobs
from tether_cli.commands import keys as commands_keys
from tether_cli.commands import model_config as commands_model_config
from tether_cli.commands import models as commands_models
from tether_cli.commands import tenants as commands_tenants

Group = tuple[str, dict[str, Any]]
"""Help text of a command group, and the functions of its commands."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(commands_jobs.submit)
    app.command()(commands_jobs.infer)
    for name, (text, commands) in (_work() | _administration()).items():
        group = typer.Typer(name=name, help=text, no_args_is_help=True, rich_markup_mode=None)
        for command, function in commands.items():
            group.command(command)(function)
        app.add_typer(group)


def _work() -> dict[str, Group]:
    jobs, models, model_config = commands_jobs, commands_models, commands_model_config
    return {
        "job": (
            "Durable jobs: list, get, wait, cancel.",
            {"list": jobs.listing, "get": jobs.get, "wait": jobs.wait, "cancel": jobs.cancel},
        ),
        "model": (
            "Models: push, list, show, configure, share, delete and more.",
            {
                "push": push.push,
                "pull": models.pull,
                "list": models.listing,
                "show": models.show,
                "config": model_config.config,
                "note": model_config.note,
                "load": model_config.load,
                "unload": model_config.unload,
                "promote": models.promote,
                "rollback": models.rollback,
                "alias": models.alias,
                "shadows": models.shadows,
                "rekey": models.rekey,
                "delete": models.delete,
                "grants": grants.grants,
                "grant": grants.grant,
                "revoke": grants.revoke,
                "hand-over": grants.hand_over,
                "store": models.store,
                "gc": models.collect,
                "scrub": models.scrub,
            },
        ),
    }


def _administration() -> dict[str, Group]:
    keys, tenants, audit, config = commands_keys, commands_tenants, commands_audit, commands_config
    return {
        "key": (
            "API keys: create, list, revoke, rotate.",
            {"create": keys.create, "list": keys.listing, "revoke": keys.revoke, "rotate": keys.rotate},
        ),
        "session": ("Session tokens: create.", {"create": sessions.create}),
        "tenant": (
            "Tenants: create, list, show, set, delete.",
            {
                "create": tenants.create,
                "list": tenants.listing,
                "show": tenants.show,
                "set": tenants.change,
                "delete": tenants.delete,
            },
        ),
        "audit": (
            "The audit log: tail, search, verify, export.",
            {"tail": audit.tail, "search": audit.search, "verify": audit.verify, "export": audit.export},
        ),
        "config": (
            "Settings: show, check, schema.",
            {"show": config.show, "check": config.check, "schema": config.schema},
        ),
    }
