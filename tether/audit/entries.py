"""What one entry says: who did what, to what, with which outcome. Never what was in a request or an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from tether.wire import codec

NOBODY = "-"
"""Stands for an actor that is not known, and on subjects for no tenant."""

_SECRETS = re.compile(r"(tk_[A-Za-z0-9]{1,16})_[A-Za-z0-9_-]+|\b(ts)_[A-Za-z0-9_-]{20,}[A-Za-z0-9_.-]*")
_LONGEST = 200


class Kind(StrEnum):
    """The kinds of entries; each has subjects of its own."""

    AUTH = "auth"  # attempts to authenticate that failed, sessions made
    ACCESS = "access"  # a valid key that was refused: scope, model, another tenant's job, limits
    INFERENCE = "inference"  # synchronous requests that were put on their way
    JOB = "job"  # durable jobs: submitted, cancelled, expired
    MODEL = "model"
    KEY = "key"
    TENANT = "tenant"
    IDENTITY = "identity"  # identities and keysets that a service saw come and go
    ADMIN = "admin"  # every other act of administration
    ENVELOPE = "envelope"  # messages between services that were not acted on
    CHECKPOINT = "checkpoint"  # what each writer wrote so far


class AuditEntry(msgspec.Struct, frozen=True, array_like=True):
    """One entry; positions are the format, and trailing defaults are left out. ``at`` is UTC milliseconds."""

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
    """How many alike this entry stands for; they came within ``micros`` from ``at`` on."""
    address: str = ""
    """Where an attempt came from, as the gateway's socket says."""
    detail: str = ""


class What(StrEnum):
    """What a row of a checkpoint says."""

    BEGIN = "begin"  # a run of a writer begins
    PREVIOUS = "previous"  # how far a chain of an earlier run of the same writer went
    HEAD = "head"  # blocks ``since`` to ``number`` of a chain of this run were written since the last checkpoint
    ALIVE = "alive"  # nothing to add
    LOST = "lost"  # ``number`` entries were lost: there was no room for them
    CUT = (
        "cut"  # the last blocks of an earlier run, up to the stream's message ``number``, were gone when this one began
    )
    END = "end"  # the run ends as it should


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """One row of a checkpoint. ``at`` is when ``number`` and ``head`` were so, UTC milliseconds."""

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
    """The bytes of an entry from its fields in order; texts of clients must have gone through :func:`clean`."""
    end = len(row)
    while end > _FIRST_DEFAULT and row[end - 1] == _DEFAULTS[end - 1 - _FIRST_DEFAULT]:
        end -= 1
    return codec.pack(row[:end])


def clean(text: str) -> str:
    """A text that a client chose, fit to be kept: short, printable, and without the secret of a key or session."""
    shown = text[:_LONGEST]
    if not (shown.isascii() and shown.isprintable()):
        shown = shown.encode("unicode_escape").decode()[:_LONGEST]
    return _SECRETS.sub(r"\1\2_...", shown) if "tk_" in shown or "ts_" in shown else shown
