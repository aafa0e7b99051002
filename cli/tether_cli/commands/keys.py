"""Commands of API keys: create, list, revoke, rotate."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import quote

import typer

from tether_cli.options import Url, ask
from tether_cli.output import JsonFlag, print_json, print_table, say

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)/([smh])")

KeyId = Annotated[str, typer.Argument(metavar="KEY", help="The id from 'key list'.")]


def seconds(text: str) -> float:
    """Parse a duration such as ``90d``, ``1h``, ``30m`` or ``45s`` into seconds.

    Raises:
        BadParameter: the text is not a duration.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a duration; expected a number and s, m, h or d, such as 90d")
    return float(found[1]) * _UNITS[found[2]]


def per_second(text: str) -> float:
    """Parse a rate such as ``100/s`` or ``100/m`` into requests per second.

    Raises:
        BadParameter: the text is not a rate.
    """
    found = _RATE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a rate; expected a number, a slash and s, m or h, such as 100/s")
    return float(found[1]) / _UNITS[found[2]]


def create(
    *,
    tenant: Annotated[str, typer.Option("--tenant", metavar="TENANT", help="Tenant that owns the key.")],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help="infer, jobs, models:read, models:write, models:code, metrics or admin; repeatable.",
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="PATTERN",
            help="Models it may use, such as 'fraud-*', or 'acme/*' of another tenant; repeatable.",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate", metavar="N/s", help="Rate limit: requests per second (N/s), minute (N/m) or hour (N/h)."
        ),
    ] = None,
    burst: Annotated[
        int | None, typer.Option("--burst", metavar="N", min=0, help="Burst: requests above the rate.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", metavar="N", min=0, help="Maximum number of concurrent requests.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="DURATION", help="How long the key is valid, such as 90d or 12h.")
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Description of the key.")] = "",
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Create an API key and print it; it is never shown again."""
    body: dict[str, Any] = {"tenant": tenant, "scopes": scopes, "name": name}
    limits: dict[str, Any] = {"models": models or None, "burst": burst, "concurrency": concurrency}
    limits["rate"] = None if rate is None else per_second(rate)
    limits["expires_s"] = None if expires is None else seconds(expires)
    body.update({field: value for field, value in limits.items() if value is not None})
    _print_key(ask(url, "POST", "/v1/keys", body), json_output)


def _print_key(made: dict[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(made)
        return
    say(f"key {made['id']} of {made['tenant']}; keep it now, it is not shown again")
    typer.echo(made["key"])


def listing(*, url: Url = None, json_output: JsonFlag = False) -> None:
    """List API keys without their secrets."""
    found = ask(url, "GET", "/v1/keys")
    if json_output:
        print_json(found)
        return
    heading = ("ID", "TENANT", "NAME", "SCOPES", "MODELS", "LIMITS", "STATE", "LAST USED")
    print_table(heading, [_row(entry) for entry in found["keys"]])


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    limits = [f"{name}={entry[name]:g}" for name in ("rate", "burst", "concurrency") if entry.get(name)]
    expires = entry.get("expires_at")
    state = "revoked" if entry["revoked"] else f"until {expires}" if expires else "counts"
    shown = [entry[field] for field in ("id", "tenant", "name", "scopes", "models")]
    return (*shown, limits, state, entry.get("last_used_at"))


def revoke(key_id: KeyId, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Revoke an API key."""
    ask(url, "DELETE", "/v1/keys", last=key_id)
    if json_output:
        print_json({"id": key_id, "revoked": True})
    else:
        say(f"key {key_id} is revoked")


def rotate(
    key_id: KeyId,
    *,
    grace: Annotated[
        str, typer.Option("--grace", metavar="DURATION", help="How long the old key stays valid, such as 1h.")
    ] = "0s",
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Replace a key by a new one with the same rights, and print it once. The old key expires after the grace."""
    path = f"/v1/keys/{quote(key_id, safe='')}/rotate"
    _print_key(ask(url, "POST", path, {"grace_s": seconds(grace)}), json_output)
