"""docs/security.md names a test for every attack and docs/failures.md one for every fault, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("security", "failures")}
ATTACKS, FAULTS = (
    re.findall(rf"^\| ({letter}\d+) \|(.*)\|$", PAGES[name], re.MULTILINE)
    for name, letter in (("security", "S"), ("failures", "F"))
)
ROWS = dict([*ATTACKS, *FAULTS])
_TEST = re.compile(r"\[`([\w.]+)::(\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")


def test_every_case_has_its_row() -> None:
    assert [case for case, _ in ATTACKS] == [f"S{number}" for number in range(1, 1 + len(ATTACKS))]
    assert [case for case, _ in FAULTS] == [f"F{number}" for number in range(19, 19 + len(FAULTS))]


@pytest.mark.parametrize("case", ROWS)
def test_every_row_names_tests_that_exist(case: str) -> None:
    found = _TEST.findall(ROWS[case])
    assert found
    assert len(found) == ROWS[case].count("::")
    for shown, function, file in found:
        assert Path(file).name == shown
        tree = ast.parse((ROOT / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in names, f"{file} has no {function}"
