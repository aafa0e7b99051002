"""Rules for the paths of a version's files, shared by push, store and pull."""

from __future__ import annotations

MOST_CHARACTERS = 128
MOST_BYTES = 200
"""Limit of a name in UTF-8: temporary files beside it have longer names, and file systems allow 255."""
MOST_DEEP = 8


def fault_of(path: str) -> str:
    """Return why a version's file may not have this path; empty if it may.

    An allowed path stays below the folder that it is joined to.
    """
    names = path.split("/")
    if len(names) > MOST_DEEP:
        return f"it has more than {MOST_DEEP} levels"
    for name in names:
        if not name or name.startswith("."):
            return "a name in it is empty or starts with a dot"
        if not name.isprintable() or "\\" in name:
            return "a name in it has a line break, a backslash, or a character that cannot be printed"
        if len(name) > MOST_CHARACTERS or len(name.encode()) > MOST_BYTES:
            return f"a name in it has more than {MOST_CHARACTERS} characters or {MOST_BYTES} bytes"
    return ""


def shown(path: str) -> str:
    """Return a path for an error message, escaped."""
    return ascii(path[:100])
