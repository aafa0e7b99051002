"""Write the parts of the documentation that the code knows best: commands, settings, routes, metrics.

Run ``python scripts/reference.py`` after a change of any of them; with ``--check`` nothing is written and the exit status
is 1 when something is not current. A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command

from tether import settings
from tether.gateway_http.access.authentication import ANY_SCOPE
from tether.gateway_http.api import route_table
from tether.gateway_http.api.route_spec import RouteSpec
from tether.process import metrics
from tether.settings_schema import SettingInfo
from tether_cli.main import application

DOCS = Path(__file__).resolve().parents[1] / "docs"
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "&#124;")


# commands


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its words, in the order of the help."""
    yield from _below("tether", get_command(application()))


def _below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from _below(f"{words} {name}", child)


def options(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def arguments(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "argument"]


def cli_reference() -> str:
    parts = []
    for words, command in commands():
        given = [_shown(argument) for argument in arguments(command)]
        usage = " ".join([words, *given, *(["[OPTIONS]"] if options(command) else [])])
        rows = [[f"`{_shown(item)}`", _help(item)] for item in arguments(command)]
        rows += [[f"`{_option(item)}`", _help(item)] for item in options(command)]
        listed = "\n" + table(("", ""), rows) if rows else ""
        parts.append(f"### `{words}`\n\n{(command.help or '').strip()}\n\n```\n{usage}\n```\n{listed}")
    return "\n".join(parts)


def _shown(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return str(name) if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return "/".join([*option.opts, *option.secondary_opts]) + value


def _help(parameter: Any) -> str:
    return str(getattr(parameter, "help", None) or "")


# settings


def settings_table() -> str:
    rows = [[f"`{info.name}`", f"`{info.env}`", _default(info), _allowed(info), info.help] for info in settings.table()]
    return table(("key", "environment", "default", "allowed", "meaning"), rows)


def _default(info: SettingInfo) -> str:
    return "" if info.default == "" else f"`{info.default}`"


def _allowed(info: SettingInfo) -> str:
    if info.choices:
        return ", ".join(f"`{choice}`" for choice in info.choices)
    if info.low is None or info.high is None:
        return "text"
    return f"{info.low:.10g} to {info.high:.10g}"


# routes


def routes_table() -> str:
    rows = [
        [
            f"`{row.method} {row.path}`",
            "any" if row.scope == ANY_SCOPE else f"`{row.scope}`" if row.scope else "none",
            row.summary,
            _statuses(row),
        ]
        for row in route_table.table()
    ]
    return table(("route", "scope", "what it does", "answers"), rows)


def _statuses(row: RouteSpec) -> str:
    return ", ".join(map(str, sorted({*row.answers, *row.statuses()})))


# metrics


def metric_rows() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name as it is exposed, type, labels and help of every metric."""
    found = []
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            (described,) = value.describe()
            name = f"{described.name}_total" if described.type == "counter" else described.name
            found.append((name, described.type, tuple(value._labelnames), described.documentation))  # noqa: SLF001 - no public way
    return found


def metrics_table() -> str:
    rows = [[f"`{name}`", kind, ", ".join(labels), text] for name, kind, labels, text in metric_rows()]
    return table(("metric", "type", "labels", "meaning"), rows)


PARTS: Mapping[str, Callable[[], str]] = {
    "cli": cli_reference,
    "settings": settings_table,
    "routes": routes_table,
    "metrics": metrics_table,
}


def current(text: str) -> str:
    """A document with its generated parts as the code would have them now."""
    return _PART.sub(lambda found: found[1] + "\n" + PARTS[found[2]]() + "\n" + found[3], text)


def main() -> int:
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if (wanted := current(text)) != text:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(wanted)
    for path in stale:
        print(f"{'not current' if '--check' in sys.argv else 'wrote'}: {path.relative_to(DOCS.parent)}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
