"""The ``tether`` command: every group of commands in one application. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tether import __version__
from tether.errors import TetherError
from tether_cli import commands_client, commands_identity, commands_platform


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tether {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve machine-learning models as a message-queue job system.

    Data goes to stdout and words to stderr; --json makes data JSON. Exit status: 0 done, 1 failed, 2 wrong usage.
    """


def application() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="tether",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_root)
    commands_platform.register(app)
    commands_client.register(app)
    commands_identity.register(app)
    return app


def main() -> None:
    """Run the command line; an error of the tree is one line on stderr and status 1."""
    try:
        application()(prog_name="tether")
    except TetherError as error:
        typer.echo(f"error: {error.message} ({error.code})", err=True)
        sys.exit(1)
