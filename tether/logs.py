"""Logs: one JSON object a line, with a fixed ``action`` and ids as fields, never in prose."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from tether.settings import Settings

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
"""The fields a record may carry through ``extra``."""


class JsonFormatter(logging.Formatter):
    """Control characters are escaped by JSON itself, so no value can forge a line."""

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
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup(settings: Settings, service: str) -> None:
    """Send this process's log records to stderr in the configured form."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {service} %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("_granian").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
