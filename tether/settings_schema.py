"""One row of the settings table, and what a value of it may be. The table itself is in :mod:`tether.settings`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.errors import ConfigError


def setting(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of the settings table."""
    return field(default=default, metadata={"help": help_text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class SettingInfo:
    """One row of the settings table, for files, help and documentation."""

    name: str
    env: str
    type: type
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]


def unknown(where: str, name: str, known: Mapping[str, Any]) -> ConfigError:
    """The error for a name that is no setting, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return ConfigError(f"{where}unknown setting '{name}'{hint}", field=name)


def parse(info: SettingInfo, text: str) -> Any:
    """The value that an environment variable's text means.

    Raises:
        ConfigError: it means none of the setting's type.
    """
    if info.type is str:
        return text
    try:
        return info.type(text)
    except ValueError as error:
        raise ConfigError(f"{info.env}={text!r} is not a {_type_name(info)}", field=info.name) from error


def checked(known: Mapping[str, SettingInfo], name: str, value: Any) -> Any:
    """The value of a setting, when it may have it.

    Raises:
        ConfigError: there is no such setting, or the value's type or range is wrong.
    """
    info = known.get(name)
    if info is None:
        raise unknown("", name, known)
    if info.type is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if value.__class__ is not info.type:
        raise ConfigError(f"setting '{name}' must be a {_type_name(info)}, not {value!r}", field=name)
    if info.choices and value not in info.choices:
        raise ConfigError(f"setting '{name}' must be one of {', '.join(info.choices)}, not {value!r}", field=name)
    if not _in_range(info, value):
        raise ConfigError(f"setting '{name}' must be between {info.low:g} and {info.high:g}, not {value!r}", field=name)
    return value


def parse_labels(text: str) -> dict[str, str]:
    """The labels of a worker, from NAME=VALUE separated by commas.

    Raises:
        ConfigError: it is no such list, or has more than 16.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    good = all(
        0 < len(name) <= 64 and len(value) <= 64 and (name + value).isprintable() for name, value in found.items()
    )
    if not good or not all(mark for _, mark, _ in pairs) or not len(found) == len(pairs) <= 16:
        raise ConfigError(
            "setting 'worker_labels' must be up to 16 different NAME=VALUE, separated by commas", field="worker_labels"
        )
    return found


def read_file(path: Path, known: Mapping[str, SettingInfo]) -> dict[str, Any]:
    """What a configuration file sets; nothing when there is none.

    Raises:
        ConfigError: it cannot be read, or names what is no setting.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    for name in content:
        if name not in known:
            raise unknown(f"{path}: ", name, known)
    return content


def _in_range(info: SettingInfo, value: Any) -> bool:
    return info.low is None or info.high is None or bool(info.low <= value <= info.high)


def _type_name(info: SettingInfo) -> str:
    return {str: "text", int: "whole number", float: "number"}[info.type]


def schema_of(infos: Iterable[SettingInfo]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a file with these settings."""
    kinds = {str: "string", int: "integer", float: "number"}
    properties: dict[str, Any] = {}
    for info in infos:
        entry: dict[str, Any] = {"type": kinds[info.type], "default": info.default, "description": info.help}
        if info.choices:
            entry["enum"] = list(info.choices)
        if info.low is not None:
            entry["minimum"] = info.low
        if info.high is not None:
            entry["maximum"] = info.high
        properties[info.name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Tether service configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
