"""Commands of service identities: add, list, rotate, revoke, resign, renew. Each change publishes a newer keyset."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether_cli.options import DataDir, Nats, RootKeyPath, root_key
from tether_cli.output import JsonFlag, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    from tether.crypto import IdentityRecord
    from tether.process.data_dir import Home
    from tether.settings import Settings

Name = Annotated[str, typer.Argument(metavar="NAME", help="The identity's name.")]
Who = Annotated[str, typer.Argument(metavar="NAME|KEY", help="An identity, or a prefix of a key id.")]
RoleName = Annotated[
    str, typer.Option("--role", metavar="ROLE", help="gateway, dispatcher, worker, modelstore or admin.")
]
TenantName = Annotated[
    str, typer.Option("--tenant", metavar="TENANT", help="The isolated tenant whose jobs alone the worker serves.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Also write a data directory for the identity's machine to DIR."),
]
Before = Annotated[
    str,
    typer.Option(
        "--before",
        metavar="TIME",
        help="Last time the key was certainly not leaked: RFC 3339, or a duration ago, such as 2h.",
    ),
]
ValidDays = Annotated[
    int, typer.Option("--valid-days", metavar="N", min=1, max=36500, help="How long the key is valid.")
]
Grace = Annotated[
    int, typer.Option("--grace", metavar="SECONDS", min=0, max=31_536_000, help="How long the old key stays valid.")
]


def add(
    name: Name,
    *,
    role: RoleName,
    tenant: TenantName = "",
    out: Out = None,
    valid_days: ValidDays = 3650,
    data_dir: DataDir = None,
    nats: Nats = None,
    root: RootKeyPath = None,
    json_output: JsonFlag = False,
) -> None:
    """Add an identity with its own keys."""
    from tether.identity import keyset_editor

    settings, home = _open(data_dir, nats)
    made = keyset_editor.add(home, root_key(home, root), name, _role(role), tenant=tenant, valid_days=valid_days)
    _done(settings, home, made, _exported(home, made, out, root), json_output)


def listing(data_dir: DataDir = None, json_output: JsonFlag = False) -> None:
    """List every key in the keyset with its state: current, outgoing, expired or revoked."""
    import dataclasses

    from tether.identity import keyset_editor

    _, home = _open(data_dir, None)
    rows = [dataclasses.asdict(row) for row in keyset_editor.listing(home)]
    for row in rows:
        for time in ("not_before", "expires_at"):
            row[time] = _date(row[time])
    if json_output:
        print_json(rows)
        return
    columns = ("name", "role", "tenant", "kid", "state", "expires_at")
    print_table(columns, [[row[column] for column in columns] for row in rows])


def rotate(
    name: Name,
    *,
    grace: Grace = 3600,
    out: Out = None,
    valid_days: ValidDays = 3650,
    data_dir: DataDir = None,
    nats: Nats = None,
    root: RootKeyPath = None,
    json_output: JsonFlag = False,
) -> None:
    """Give an identity a new signing key; a running service on this data directory adopts it."""
    from tether.identity import keyset_editor

    settings, home = _open(data_dir, nats)
    made = keyset_editor.rotate(home, root_key(home, root), name, grace_s=grace, valid_days=valid_days)
    _done(settings, home, made, _exported(home, made, out, root), json_output)


def revoke(
    who: Who,
    *,
    data_dir: DataDir = None,
    nats: Nats = None,
    root: RootKeyPath = None,
    json_output: JsonFlag = False,
) -> None:
    """Revoke an identity or one of its keys. Its service stops."""
    from tether.identity import keyset_editor

    settings, home = _open(data_dir, nats)
    gone = keyset_editor.revoke(home, root_key(home, root), who)
    published = _publish_keyset(settings, home, lock_out=True)
    rows = [{"name": item.name, "kid": item.kid.hex()} for item in gone]
    if json_output:
        print_json({"revoked": rows, "published": published})
    else:
        for row in rows:
            print_fields(row)
        say("stored entries that it signed are no longer valid; 'tether identity resign' saves those older than a leak")


def resign(
    who: Who,
    *,
    before: Before,
    data_dir: DataDir = None,
    nats: Nats = None,
    json_output: JsonFlag = False,
) -> None:
    """Re-sign entries that a key signed before a leak, with other identities of this data directory."""
    import dataclasses

    from tether.errors import BrokerUnavailable
    from tether.identity import resigning as entries
    from tether_cli import audit_queries
    from tether_cli.commands.keys import seconds

    settings, home = _open(data_dir, nats)
    if not settings.nats_url:
        raise BrokerUnavailable("no platform runs on this data directory; start it, or give --nats")
    kids, before_ms = entries.keys_of(home, who), audit_queries.time_of(before, seconds)
    done = asyncio.run(entries.resign(settings, home, kids, before_ms))
    if json_output:
        print_json(dataclasses.asdict(done))
        return
    print_fields({"signed": len(done.signed), "left": len(done.left)})
    for entry in done.left:
        say(f"not signed: {entry} was stored after {_date(before_ms)}, or its key may not sign it")
    for bucket in done.nobody:
        say(f"not checked: no other identity of this data directory may sign the bucket '{bucket}'")


def renew(
    *,
    valid_days: ValidDays = 3650,
    data_dir: DataDir = None,
    nats: Nats = None,
    root: RootKeyPath = None,
    json_output: JsonFlag = False,
) -> None:
    """Re-sign the keyset to extend its validity and that of every current key."""
    from tether.identity import keyset_editor

    settings, home = _open(data_dir, nats)
    made = keyset_editor.renew(home, root_key(home, root), valid_days=valid_days)
    fields = {"version": made.version, "expires_at": _date(made.expires_at)}
    published = _publish_keyset(settings, home)
    if json_output:
        print_json({**fields, "published": published})
    else:
        print_fields(fields)


def register(app: typer.Typer) -> None:
    """Add ``tether identity`` to the application."""
    group = typer.Typer(help="Service identities: add, rotate, revoke and renew their keys.", no_args_is_help=True)
    group.command("add")(add)
    group.command("list")(listing)
    group.command("rotate")(rotate)
    group.command("revoke")(revoke)
    group.command("resign")(resign)
    group.command("renew")(renew)
    app.add_typer(group, name="identity")


def _open(data_dir: str | None, nats: str | None) -> tuple[Settings, Home]:
    import dataclasses

    from tether.process.data_dir import Home
    from tether.settings import load
    from tether_cli.platform.up import read_endpoints

    settings = load("broker", overrides={"home": data_dir, "nats_url": nats})
    home = Home.at(settings.home)
    running = None if settings.nats_url else read_endpoints(home)
    return (settings if running is None else dataclasses.replace(settings, nats_url=running["nats"])), home


def _role(text: str) -> Any:
    from tether.crypto import Role
    from tether.errors import InvalidRequest

    if text not in set(Role):
        raise InvalidRequest(f"'{text[:64]}' is not a role; expected one of {', '.join(Role)}", field="role")
    return Role(text)


def _date(milliseconds: int) -> str:
    """Return UTC milliseconds as RFC 3339; empty for 0."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else ""


def _done(settings: Settings, home: Home, made: IdentityRecord, out: Path | None, json_output: bool) -> None:
    fields = {
        "name": made.name,
        "role": str(made.role),
        "tenant": made.tenant,
        "kid": made.kid.hex(),
        "expires_at": _date(made.expires_at),
    }
    if out is not None:
        fields["out"] = str(out)
    published = _publish_keyset(settings, home)
    if json_output:
        print_json({**fields, "published": published})
    else:
        print_fields(fields)


def _exported(home: Home, made: IdentityRecord, out: Path | None, root: Path | None) -> Path | None:
    """Write the data directory for another machine, with certificates if this one can sign them."""
    if out is None:
        return None
    from tether.identity import keyset_editor
    from tether.identity.certificates import authority_locked, issue_client
    from tether.process.data_dir import Home

    target = Home(keyset_editor.export(home, made.name, out))
    if home.authority_key.exists():
        key = root_key(home, root)
        issue_client(home, target, made.name, passphrase=key.passphrase() if authority_locked(home) else "")
    elif home.tls_file("ca.crt").exists():
        say(
            f"{home.authority_key} is not on this machine: copy tls/ca.crt and a client certificate into "
            f"{target.root}/tls"
        )
    return target.root


def _publish_keyset(settings: Settings, home: Home, *, lock_out: bool = False) -> bool:
    """Publish the keyset to running services and apply it to the broker; return True if a broker took it.

    A new login is admitted before its keyset is published. For ``lock_out`` the keyset is published first, so
    that the revoked service can return its pending jobs.

    A new login is let in before anybody hears of it. To ``lock_out`` one, its owner hears of it first, so that it can give
    back what it has in hand.
    """
    import logging

    from tether.bus.key_value.keyset_sync import SETTLE_S
    from tether.errors import TetherError

    logging.getLogger("tether").setLevel(logging.CRITICAL)
    if not settings.nats_url:
        say("no platform runs on this data directory; services read the new keyset when they start")
        return False
    try:
        if not lock_out:
            _reload(settings, home)
        asyncio.run(_publish(settings, home, settle_s=SETTLE_S if lock_out else 0.0))
        if lock_out:
            _reload(settings, home)
    except TetherError as error:
        say(
            f"the keyset was not fully published ({error.code}: {error.message}); give the dispatcher "
            "this keyset, and it publishes it"
        )
        return False
    say("the keyset was published to the running services")
    return True


def _reload(settings: Settings, home: Home) -> None:
    from tether.broker.embedded_server import reload_embedded

    if not reload_embedded(home, settings):
        say("the broker does not use this data directory: give it the users.conf of 'tether init --nats-config DIR'")


async def _publish(settings: Settings, home: Home, *, settle_s: float) -> None:
    from tether.bus.key_value.keyset_sync import TrustedKeyset, offer
    from tether.bus.session import connect

    async with connect(settings, home, "admin", follow=False) as bus:
        await offer(bus, TrustedKeyset.load(home))
        await asyncio.sleep(settle_s)
