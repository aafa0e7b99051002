"""Labels and note of a version, which may change while the version does not: frozen values and rules of
changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tether.errors import InvalidRequest

MOST_LABELS = 16
LONGEST_LABEL = 64
LONGEST_NOTE = 2000


class VersionNote(msgspec.Struct, frozen=True):
    """Labels and note of one version; without an entry it has none. ``changed_at`` is UTC seconds."""

    model: str
    version: int
    labels: Mapping[str, str] = {}
    note: str = ""
    revision: int = 0
    changed_at: float = 0.0
    changed_by: str = ""


class NotePatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A merge patch of labels and note: labels are merged, null removes one; ``note`` replaces the current
    note."""

    labels: Mapping[str, str | None] = {}
    note: str | None = None


def noted(before: VersionNote, patch: NotePatch) -> VersionNote:
    """Apply a patch to ``before``.

    Raises:
        InvalidRequest: naming the field and its allowed values.
    """
    labels = {**before.labels, **patch.labels}
    kept = {name: value for name, value in labels.items() if value is not None}
    for name, value in kept.items():
        text = f"{name}{value}"
        if not 0 < len(name) <= LONGEST_LABEL or len(value) > LONGEST_LABEL or not text.isprintable():
            raise InvalidRequest(
                f"a label must have 1 to {LONGEST_LABEL} printable characters, and its value at most {LONGEST_LABEL}",
                field="labels",
            )
    if len(kept) > MOST_LABELS:
        raise InvalidRequest(f"a version has at most {MOST_LABELS} labels, got {len(kept)}", field="labels")
    note = before.note if patch.note is None else patch.note
    if len(note) > LONGEST_NOTE or not note.replace("\n", "").replace("\t", "").isprintable():
        raise InvalidRequest(
            f"note must have at most {LONGEST_NOTE} printable characters, tabs and line breaks", field="note"
        )
    return msgspec.structs.replace(before, labels=dict(sorted(kept.items())), note=note)


def patch_of(values: Mapping[str, Any]) -> NotePatch:
    """Convert a patch from plain values.

    Raises:
        InvalidRequest
    """
    try:
        return msgspec.convert(values, NotePatch)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"labels or note are invalid: {str(error)[:300]}", field="labels") from error
