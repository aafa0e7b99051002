"""Logs: one JSON object a line, with a fixed ``action`` and ids as fields, never in the message."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from tether.errors import one_line
from tether.settings import Settings, ignored

log = logging.getLogger(__name__)

FIELDS = (
    "action",
    "request_id",
    "job_id",
    "tenant",
    "model",
    "version",
    "worker",
    "code",
    "sender",
    "attempt",
    "state",
)
"""Fields that a record may carry in ``extra``."""


_SECRETS = re.compile(r"(tk_[a-z2-7]{8})_[A-Za-z0-9_-]{20,}|(ts_[A-Za-z0-9]{1,12})[A-Za-z0-9_.-]{20,}")


def without_secrets(text: str) -> str:
    """Return ``text`` with API keys and session tokens cut to their identifying prefix."""
    return _SECRETS.sub(lambda found: f"{found[1] or found[2]}_<secret>", text)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(record, name)) for name in FIELDS if hasattr(record, name))


class TextFormatter(logging.Formatter):
    """Formats records for people: one line with fields at its end, exceptions indented below."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{time} {record.levelname:<7} {self._service} {one_line(record.getMessage())}"
        line += "".join(f" {name}={one_line(str(value))}" for name, value in _fields(record) if name != "action")
        if record.exc_info:
            line += "".join(f"\n  {one_line(part)}" for part in self.formatException(record.exc_info).splitlines())
        return without_secrets(line)


class JsonFormatter(logging.Formatter):
    """Formats records as JSON, which escapes control characters, so that no value can forge a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "message": record.getMessage(),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str))


def setup(settings: Settings, service: str) -> None:
    """Send log records to stderr in the configured form; the first ones list ignored variables."""
    handler = logging.StreamHandler(sys.stderr)
    form = settings.log_format
    if form == "json" or (form == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(TextFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("_granian").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for line in ignored():
        log.warning(line, extra={"action": "setting_ignored"})
