"""The ``tether`` command: all groups in one application. Heavy imports happen only when a command runs."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from tether import __version__
from tether.errors import TetherError
from tether_cli.commands import client, identity, platform


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tether {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve machine-learning models as a message-queue job system.

    Data goes to stdout and words to stderr; --json makes data JSON. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    from tether import settings

    if context.invoked_subcommand not in settings.SERVICES:  # a service logs its version
        for line in settings.ignored():
            typer.echo(f"warning: {line}", err=True)


def application() -> typer.Typer:
    """Build the whole command tree."""
    app = typer.Typer(
        name="tether",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_root)
    platform.register(app)
    client.register(app)
    identity.register(app)
    return app


def main() -> None:
    """Run the command line; print an error as one line on stderr and exit with status 1."""
    try:
        try:
            application()(prog_name="tether")
        finally:
            if sys.stdout is not None:  # closed by who started it
                sys.stdout.flush()
    except TetherError as error:
        _fail(f"{error.message} ({error.code})")
    except OSError as error:
        _fail(_os_error_text(error))


_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)


def _os_error_text(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        # a failed write to an open file, usually standard output; timeouts and lost connections are OSErrors
        # too
        return f"cannot write the output: {reason}" if error.errno in _UNWRITTEN else reason
    hint = {
        errno.EACCES: "; use another user or another path",
        errno.EROFS: "; use a writable path",
        errno.ENOSPC: "; free some room there",
        errno.EDQUOT: "; free some room there",
        errno.EMFILE: "; raise the limit of open files (ulimit -n)",
        errno.ENOTDIR: "; name a folder",
        errno.EISDIR: "; name a file",
    }.get(error.errno or 0, "")
    return f"{os.fsdecode(error.filename)}: {reason}{hint}"


def _fail(message: str) -> None:
    with contextlib.suppress(OSError):
        typer.echo(f"error: {message}", err=True)
    # Python flushes standard output once more when it ends, and would print a traceback if that fails too
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(1)
