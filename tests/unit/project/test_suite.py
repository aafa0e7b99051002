"""The suite itself: pytest imports test files by their name alone, so two of one name hide one another."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from chaos import __main__ as chaos_scripts
from chaos import report
from support.suite import alone, groups

TESTS = Path(__file__).parents[2]


def test_every_test_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name not in ("conftest.py", "__init__.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/unit/test_x.py::test_y", "tests/unit/test_x.py"),
        ("tests/unit/test_x.py::test_y[a-b]", "tests/unit/test_x.py"),
        ("tests/integration/test_x.py::test_y[container-3]", "container"),
        ("tests/integration/test_x.py::test_y[container]", "container"),
        ("tests/integration/test_x.py::test_container[embedded]", "tests/integration/test_x.py"),
        ("tests/acceptance/test_x.py::test_y[container]", "acceptance"),
        ("tests/integration/trust/test_keyset.py::test_y[embedded]", "alone"),
    ],
)
def test_tests_that_share_something_are_one_group(nodeid: str, group: str) -> None:
    assert groups.group_of(nodeid) == group


def test_files_whose_tests_are_alone_are_there() -> None:
    assert {path.name for path in TESTS.rglob("test_*.py")} >= groups.ALONE_FILES


def test_what_is_alone_keeps_its_place_for_the_next_that_is(tmp_path: Path) -> None:
    def free() -> bool:
        with (tmp_path / "running").open("w") as running:
            try:
                fcntl.flock(running, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    places = alone.Places(tmp_path)
    with places.place(alone=True, then_alone=True):
        assert not free()
    assert not free()
    with places.place(alone=True, then_alone=False):
        assert not free()
    assert free()
    with places.place(alone=True, then_alone=True):
        pass
    with places.place(alone=False, then_alone=False):
        assert free(), "another one came next, beside which others may run"


def test_in_several_processes_the_tests_of_a_file_stay_together() -> None:
    """pytest 9.2 made the groups of pytest-xdist 3.8 vanish without a word."""
    names = ("tenant", "subjects", "apikey", "limits")
    files = [str(next(TESTS.rglob(f"test_{name}.py")).relative_to(TESTS.parent)) for name in names]
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", *files]
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST_", "TETHER_TEST_"))}
    run = subprocess.run(
        command, cwd=TESTS.parent, env=inherited, capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 0, run.stdout
    processes = defaultdict(set)
    for process, file in re.findall(r"^\[(gw\d)\].*PASSED (\S+?)::", run.stdout, re.MULTILINE):
        processes[file].add(process)
    assert sorted(processes) == sorted(files)
    assert [len(found) for found in processes.values()] == [1] * len(files)
    assert len(set.union(*processes.values())) == 2


@pytest.mark.parametrize("name", chaos_scripts.SCRIPTS)
def test_every_script_of_make_chaos_takes_the_arguments_that_it_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = importlib.import_module(f"chaos.{name.partition('-')[0]}")
    asked: list[str] = []

    def asked_for(text: str | None, **defaults: float | str) -> Namespace:
        asked.extend(defaults)
        return report.arguments(text, **defaults)

    class Enough(Exception):
        """The script has its arguments."""

    def enough(*_: object, **__: object) -> None:
        raise Enough

    _, words = chaos_scripts.SCRIPTS[name]
    monkeypatch.setattr(sys, "argv", [name, *words, "--folder", str(tmp_path), "--seed", "3", "--port", "1"])
    monkeypatch.setattr(script, "arguments", asked_for)
    for first in ("Platform", "need", "library"):
        if hasattr(script, first):
            monkeypatch.setattr(script, first, enough)
    with pytest.raises(Enough):
        script.main()
    assert {word.removeprefix("--").replace("-", "_") for word in words[::2]} <= set(asked)


def test_pytest_collects_no_script_of_make_chaos() -> None:
    assert [path.name for path in (TESTS / "chaos").iterdir() if path.name.startswith("test_")] == []
