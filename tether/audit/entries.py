"""Audit entries: actor, action, object and outcome. Never the content of a request or an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from tether.wire import codec

NOBODY = "-"
"""Placeholder for an unknown actor, and on subjects for no tenant."""

_SECRETS = re.compile(r"(tk_[A-Za-z0-9]{1,16})_[A-Za-z0-9_-]+|\b(ts)_[A-Za-z0-9_-]{20,}[A-Za-z0-9_.-]*")
_LONGEST = 200


class Kind(StrEnum):
    """Kinds of entries; each has its own subjects."""

    AUTH = "auth"  # failed authentication attempts, created sessions
    ACCESS = "access"  # refusals of a valid key: scope, model, another tenant's job, limits
    INFERENCE = "inference"  # synchronous requests that were sent to a lane
    JOB = "job"  # durable jobs: submitted, cancelled, expired
    MODEL = "model"
    KEY = "key"
    TENANT = "tenant"
    IDENTITY = "identity"  # identities and keysets added or removed at a service
    ADMIN = "admin"  # every other administrative action
    ENVELOPE = "envelope"  # refused messages between services
    CHECKPOINT = "checkpoint"  # checkpoints of each writer


class AuditEntry(msgspec.Struct, frozen=True, array_like=True):
    """One entry; field positions are the format, and trailing defaults are left out. ``at`` is UTC milliseconds."""

    at: int
    actor: str
    """``key:<id>``, the name of an identity, or ``-``."""
    action: str
    outcome: str
    """``ok`` or the code of an error."""
    model: str = ""
    version: int = 0
    job: str = ""
    request_id: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    micros: int = 0
    count: int = 1
    """Number of identical events in this entry; they occurred within ``micros`` from ``at`` on."""
    address: str = ""
    """Source address of an attempt, from the gateway's socket."""
    detail: str = ""


class What(StrEnum):
    """Types of checkpoint rows."""

    BEGIN = "begin"  # a run of a writer starts
    PREVIOUS = "previous"  # end of a chain of an earlier run of the same writer
    HEAD = "head"  # blocks ``since`` to ``number`` of a chain of this run, written since the last checkpoint
    ALIVE = "alive"  # nothing to list
    LOST = "lost"  # ``number`` entries were lost for lack of room
    CUT = "cut"  # an earlier run's last blocks, up to the stream's message ``number``, were missing at this run's start
    END = "end"  # the run ends regularly


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """One row of a checkpoint. ``at`` is the time of ``number`` and ``head``, UTC milliseconds."""

    at: int
    what: What
    run: str
    subject: str = ""
    since: int = 0
    number: int = 0
    head: bytes = b""


_DEFAULTS = ("", 0, "", "", 0, 0, 0, 1, "", "")
_FIRST_DEFAULT = 4


def encode(row: Sequence[Any]) -> bytes:
    """Encode an entry from its fields in order; texts of clients must be cleaned with :func:`clean` first."""
    end = len(row)
    while end > _FIRST_DEFAULT and row[end - 1] == _DEFAULTS[end - 1 - _FIRST_DEFAULT]:
        end -= 1
    return codec.pack(row[:end])


def clean(text: str) -> str:
    """Clean a text from a client for storage: short, printable, and without the secret of a key or session."""
    shown = text[:_LONGEST]
    if not (shown.isascii() and shown.isprintable()):
        shown = shown.encode("unicode_escape").decode()[:_LONGEST]
    return _SECRETS.sub(r"\1\2_...", shown) if "tk_" in shown or "ts_" in shown else shown
