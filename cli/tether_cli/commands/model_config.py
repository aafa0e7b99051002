"""Commands of model configurations: show, change, reset; load and unload; labels and notes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tether_cli.options import ModelName, Timeout, Url, connect
from tether_cli.output import JsonFlag, print_json, print_table, say

LARGEST = 1 << 20


def read_config(path: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        InvalidRequest: the file has none.
    """
    from pathlib import Path

    import msgspec

    from tether.errors import InvalidRequest

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="config") from error
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{path} is not a JSON object: {error}", field="config") from error


def config(
    name: ModelName,
    *,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set a field, such as queue.max_size=100; null: the default."
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Set the fields of this JSON object.")
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Reset every field to its default before --set applies.")
    ] = False,
    revision: Annotated[
        int | None, typer.Option("--revision", metavar="N", min=0, help="Only if the configuration has this revision.")
    ] = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Show or change how a model is served. A change applies to all versions at once, without a restart."""
    patch = _patch(assignments or [], file)
    with connect(url) as client:
        if reset:
            answer = client.reset_config(name, revision=revision)
            revision = None if revision is None else answer["revision"]
        if patch:
            answer = client.configure(name, patch, revision=revision)
        elif not reset:
            answer = client.config(name)
    if json_output:
        print_json(answer)
        return
    print_table(("FIELD", "VALUE"), _rows(answer))
    say(f"revision {answer['revision']}" + (f", by {answer['changed_by']}" if answer["changed_by"] else ""))


def load(
    name: ModelName,
    *,
    url: Url = None,
    timeout: Timeout = 60.0,
    json_output: JsonFlag = False,
) -> None:
    """Load an unloaded model, and wait until a worker hosts its newest version."""
    with connect(url, timeout) as client:
        answer = client.load(name)
    _loaded(answer, json_output=json_output)


def unload(name: ModelName, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Unload a model from all workers until it is loaded again. Its durable jobs wait."""
    with connect(url) as client:
        answer = client.unload(name)
    _loaded(answer, json_output=json_output)


def _loaded(answer: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(answer)
    else:
        typer.echo(f"{answer['name']} {answer['version']} {answer['state']}")


Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label; without '=VALUE' it is removed.")
]
Note = Annotated[str | None, typer.Option("--note", metavar="TEXT", help="Description of the version.")]


def labels_of(texts: list[str] | None) -> dict[str, str | None]:
    """Parse label options; None removes a label."""
    found: dict[str, str | None] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        found[name] = value if equals else None
    return found


def note(
    name: ModelName,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="The version's number.")],
    *,
    label: Labels = None,
    text: Note = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Set or change labels and description of a version; its files stay unchanged."""
    with connect(url) as client:
        answer = client.annotate(name, version, labels=labels_of(label), note=text)
    if json_output:
        print_json(answer)
        return
    labels = [f"{key}={value}" for key, value in answer["labels"].items()]
    typer.echo(f"{answer['model']} {answer['version']} {' '.join(labels)}".rstrip())
    if answer["note"]:
        typer.echo(answer["note"])


def _patch(assignments: list[str], file: str | None) -> dict[str, Any]:
    found = {} if file is None else read_config(file)
    for text in assignments:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise typer.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint="--set")
        *outer, last = field.split(".")
        place = found
        for part in outer:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise typer.BadParameter(f"{field!r}: {part!r} is already set to a value", param_hint="--set")
            place = inner
        place[last] = _value(value)
    return found


def _value(text: str) -> Any:
    """Parse a value as JSON, else keep the text: priorities and kinds need no quotes."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text


def _rows(answer: dict[str, Any], where: str = "") -> list[tuple[str, str]]:
    """Return a row per field except the stamps; fields of objects as ``outer.inner``."""
    import json

    rows: list[tuple[str, str]] = []
    for name, value in answer.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{where}{name}.")
        elif where or name not in ("model", "revision", "changed_at", "changed_by"):
            rows.append((f"{where}{name}", value if isinstance(value, str) else json.dumps(value)))
    return rows
