"""Which paths the files of a version may have: one rule for who pushes, who stores and who pulls."""

from __future__ import annotations

MOST_CHARACTERS = 128
MOST_BYTES = 200
"""Of a name, in UTF-8: temporary files get longer names beside it, and file systems end at 255."""
MOST_DEEP = 8


def fault_of(path: str) -> str:
    """Why a version's file may not have this path; empty when it may: it stays below its folder whatever it is joined to."""
    names = path.split("/")
    if len(names) > MOST_DEEP:
        return f"it is more than {MOST_DEEP} folders deep"
    for name in names:
        if not name or name.startswith("."):
            return "a name in it is empty or begins with a dot"
        if not name.isprintable() or "\\" in name:
            return "a name in it has a line break, a backslash, or a character that cannot be printed"
        if len(name) > MOST_CHARACTERS or len(name.encode()) > MOST_BYTES:
            return f"a name in it has more than {MOST_CHARACTERS} characters or {MOST_BYTES} bytes"
    return ""


def shown(path: str) -> str:
    """A path for an error, whatever is in it."""
    return ascii(path[:100])
