"""Keep files and functions short: at most 400 lines a file, 60 a function. Exceptions are named, with a reason."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
MEDIAN_LINES = 10
FOLDERS = ("tether", "cli", "bench", "examples", "scripts", "tests")

EXCEPTIONS: dict[str, str] = {}
"""``path`` or ``path::function`` -> why it may be longer."""


def sources(root: Path) -> list[Path]:
    """Every Python file of the project."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Key and complaint of everything in one file that is over a limit."""
    lines = len(path.read_text().splitlines())
    if lines > FILE_LINES:
        yield name, f"{name}: {lines} lines, at most {FILE_LINES}: split it"
    for function, length in functions(path):
        if length > FUNCTION_LINES:
            yield f"{name}::{function}", f"{name}::{function}: {length} lines, at most {FUNCTION_LINES}: split it"


def main() -> int:
    """Print what is too long; 1 when anything is."""
    root = Path(__file__).resolve().parent.parent
    paths = sources(root)
    found = dict(item for path in paths for item in too_long(path, str(path.relative_to(root))))
    complaints = [text for key, text in found.items() if key not in EXCEPTIONS]
    complaints += [f"{key}: no longer too long; remove its exception" for key in EXCEPTIONS if key not in found]
    median = statistics.median([length for path in paths for _, length in functions(path)] or [0])
    if median > MEDIAN_LINES:
        complaints.append(f"the median function has {median:g} lines, at most {MEDIAN_LINES}")
    for complaint in complaints:
        print(complaint)
    print(
        f"sizes: {len(paths)} files, median function {median:g} lines, {len(complaints)} over a limit", file=sys.stderr
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
