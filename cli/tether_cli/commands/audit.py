"""Commands of the audit log: tail, search, verify, export. They need the admin's keys; elsewhere use GET /v1/audit."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether_cli.commands.keys import seconds
from tether_cli.output import JsonFlag, print_json, say

if TYPE_CHECKING:
    from tether.audit.reader import Filter, Found
    from tether.process.data_dir import Home
    from tether.settings import Settings

DataDir = Annotated[str | None, typer.Option("--data-dir", metavar="DIR", help="Data directory; default: TETHER_HOME.")]
Tenant = Annotated[str, typer.Option("--tenant", metavar="TENANT", help="Only entries of this tenant.")]
Kind = Annotated[
    str,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="auth, access, inference, job, model, key, tenant, identity, admin or envelope.",
    ),
]
Time = Annotated[str, typer.Option(metavar="TIME", help="RFC 3339 time, or a duration ago, such as 2h.")]


def _home(data_dir: str | None) -> tuple[Settings, Home]:
    import logging

    from tether.process.data_dir import Home
    from tether.settings import load

    logging.getLogger("tether").setLevel(logging.CRITICAL)
    settings = load("broker", overrides={"home": data_dir})
    return settings, Home.at(settings.home)


def _filter(tenant: str, kind: str, **more: Any) -> Filter:
    from tether import audit
    from tether.audit.reader import Filter

    known = [item.value for item in audit.Kind if item is not audit.Kind.CHECKPOINT]
    if kind and kind not in known:
        raise typer.BadParameter(f"unknown kind '{kind}'; expected one of {', '.join(known)}")
    return Filter(tenant=tenant, kind=audit.Kind(kind) if kind else None, **more)


def _show(found: Found, *, json_output: bool) -> None:
    from tether_cli import audit_queries

    if json_output:
        print_json(audit_queries.as_json(found))
    else:
        typer.echo(audit_queries.line(found))


def tail(
    *,
    tenant: Tenant = "",
    kind: Kind = "",
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=0, help="Entries to print first.")] = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print new entries until interrupted.")] = False,
    data_dir: DataDir = None,
    json_output: JsonFlag = False,
) -> None:
    """Print the newest entries, oldest first, one per line."""
    from tether_cli import audit_queries

    settings, home = _home(data_dir)
    wanted = _filter(tenant, kind)

    def show(found: Found) -> None:
        _show(found, json_output=json_output)

    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(audit_queries.follow(settings, home, wanted, lines, show))
        return
    for found in reversed(asyncio.run(audit_queries.search(settings, home, wanted, lines)) if lines else []):
        show(found)


def search(
    *,
    tenant: Tenant = "",
    kind: Kind = "",
    since: Time = "",
    until: Time = "",
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Only entries about this model.")] = "",
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="Only actions of the API key with this id.")] = "",
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="Only entries about this job.")] = "",
    outcome: Annotated[
        str, typer.Option("--outcome", metavar="CODE", help="Only this outcome: 'ok' or an error code.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Maximum number of entries.")] = 100,
    data_dir: DataDir = None,
    json_output: JsonFlag = False,
) -> None:
    """Print matching entries, newest first, one per line."""
    from tether_cli import audit_queries

    settings, home = _home(data_dir)
    times = {name: audit_queries.time_of(text, seconds) for name, text in (("since", since), ("until", until)) if text}
    wanted = _filter(tenant, kind, model=model, key=key, job=job, outcome=outcome, **times)
    for found in asyncio.run(audit_queries.search(settings, home, wanted, limit)):
        _show(found, json_output=json_output)


def verify(
    *,
    from_file: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="Verify this export instead of the broker's log.")
    ] = None,
    data_dir: DataDir = None,
    json_output: JsonFlag = False,
) -> None:
    """Verify that no entry of the log was changed, moved, repeated or removed; exit status 1 otherwise."""
    from pathlib import Path

    import msgspec

    from tether_cli import audit_queries

    settings, home = _home(data_dir)
    if from_file is None:
        report = asyncio.run(audit_queries.verify(settings, home))
    else:
        report = audit_queries.verify_file(settings, home, Path(from_file))
    if json_output:
        print_json(msgspec.to_builtins(report))
    else:
        for problem in report.problems:
            typer.echo(problem.line())
        for note in report.notes:
            say(f"note: {note}")
        span = (
            f", {audit_queries.when(report.first_at)} to {audit_queries.when(report.last_at)}" if report.blocks else ""
        )
        state = "whole" if report.blocks else "empty"
        if count := len(report.problems):
            state = f"{count} problem{'s' if count > 1 else ''}"
        say(
            f"{state}: {report.entries} entries in {report.blocks} blocks by "
            f"{', '.join(report.writers) or 'no writer'}{span}"
        )
    if report.problems:
        raise typer.Exit(1)


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File to write.")], *, data_dir: DataDir = None
) -> None:
    """Export the whole log to a file that 'verify --from' checks without a broker."""
    from pathlib import Path

    from tether_cli import audit_queries

    settings, home = _home(data_dir)
    count = asyncio.run(audit_queries.export(settings, home, Path(file)))
    say(f"wrote {count} blocks to {file}")
