"""The documentation says what the code does: nothing is missing, and nothing is there that does not exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference

from tether import environment, settings
from tether.bus.errors import JetStreamError
from tether.errors import all_errors
from tether.gateway_http.http.error_responses import status_of
from tether_cli.main import application

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text(name: str) -> str:
    return (DOCS / name).read_text()


def rows(page: str) -> Iterator[list[str]]:
    """The cells of every table row whose first cell is code."""
    for line in page.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_current(path: Path) -> None:
    """``python scripts/reference.py`` makes them so."""
    page = path.read_text()
    assert reference.current(page) == page


def test_every_kind_of_reference_is_in_the_documentation() -> None:
    whole = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert all(f"<!-- generated: {name} -->" in whole for name in reference.PARTS)


def test_every_command_and_option_is_documented() -> None:
    page = text("cli.md")
    for words, command in reference.commands():
        section = page.partition(f"### `{words}`\n")[2].partition("\n### ")[0]
        assert section, f"{words} is not in cli.md"
        for option in reference.options(command):
            assert all(name in section for name in option.opts), f"{words} {option.opts}"
    documented = re.findall(r"^### `(tether .*)`$", page, re.MULTILINE)
    assert documented == [words for words, _ in reference.commands()]


def test_every_setting_and_no_other_is_documented() -> None:
    part = text("settings.md").partition("<!-- generated")[2]
    assert [row[0].strip("`") for row in rows(part)] == [info.name for info in settings.table()]
    assert {row[1].strip("`") for row in rows(part)} == {info.env for info in settings.table()}


def test_every_variable_that_is_mentioned_is_read() -> None:
    known = {info.env for info in settings.table()} | set(environment.OTHER_VARIABLES) | {"TETHER_CONFIG_DIR"}
    streams = {"TETHER_INFER_0", "TETHER_JOBS_0", "TETHER_RESULTS", "TETHER_DEAD", "TETHER_CHUNKS_0", "TETHER_"}
    streams |= {"TETHER_INFER_", "TETHER_JOBS_", "TETHER_RESULTS_", "TETHER_CHUNKS_"}
    for path in PAGES:
        for name in re.findall(r"\bTETHER_[A-Z0-9_]*", path.read_text()):
            assert name in known | streams or name.startswith(settings.TEST_PREFIX), f"{path.name}: {name}"


def test_every_error_code_is_documented_with_its_status_and_no_other() -> None:
    ours = [kind for kind in all_errors() if kind.__module__.startswith("tether.")]
    assert JetStreamError in ours
    documented = {row[0].strip("`"): (int(row[1]), row[2] == "yes") for row in rows(text("errors.md"))}
    assert documented == {kind.code: (status_of(kind("x")), kind.retryable) for kind in ours}


def test_every_metric_is_documented_and_none_that_does_not_exist() -> None:
    page = text("metrics.md")
    exposed = {name for name, *_ in reference.metric_rows()}
    mentioned = set(re.findall(r"\btether_[a-z_]+", page))
    assert mentioned == exposed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in _LINK.findall(path.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{path.name}: {target}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def shell_lines() -> Iterator[tuple[str, str]]:
    """Every command line of every fenced shell block, with the page it is on."""
    for path in PAGES:
        for language, block in _FENCE.findall(path.read_text()):
            if language == "sh":
                for line in block.splitlines():
                    for part in re.split(r"&&|\|\|", line):
                        yield path.name, part.partition(" #")[0].strip()


def test_commands_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = dict(reference.commands())
    seen = 0
    for page, line in shell_lines():
        if not line.startswith(("make ", "tether ")):
            continue
        seen += 1
        words = shlex.split(re.split(r"[<>]", line)[0])
        if words[0] == "make":
            assert words[1] in targets, f"{page}: {line}"
        else:
            _check_tether(known, words, f"{page}: {line}")
    assert seen > 5


def _check_tether(known: dict[str, Any], words: list[str], where: str) -> None:
    name = next((found for found in known if words[: len(found.split())] == found.split()), None)
    assert name is not None, where
    rest = words[len(name.split()) :]
    options = {spelling for option in reference.options(known[name]) for spelling in option.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, where


def test_inline_commands_exist() -> None:
    """``tether ...`` in running text names a command, or a group of them."""
    known = [words.split() for words, _ in reference.commands()]
    for path in PAGES:
        for code in re.findall(r"`(tether [a-z][^`]*)`", path.read_text()):
            words = [word for word in code.split() if re.fullmatch(r"[a-z]+", word)]
            assert any(command[: min(len(command), len(words))] == words[: len(command)] for command in known), (
                f"{path.name}: {code}"
            )


def test_help_has_a_line_for_every_command() -> None:
    assert application().info.name == "tether"
    assert all(command.help for _, command in reference.commands())


def test_the_readme_names_every_document_and_the_index_every_decision() -> None:
    page, index = (ROOT / "README.md").read_text(), DOCS / "adr" / "README.md"
    for path in (*DOCS.glob("*.md"), index):
        assert str(path.relative_to(ROOT)) in page, f"README does not link {path.name}"
    for path in DOCS.glob("adr/[0-9]*.md"):
        assert f"]({path.name})" in index.read_text(), f"docs/adr/README.md does not link {path.name}"


STEPS = re.findall(r"^\| [^|]+ \| `([a-z_/]+\.py)` \| `([\w.]+)` \|$", text("architecture.md"), re.MULTILINE)


@pytest.mark.parametrize(("file", "function"), STEPS)
def test_each_step_of_a_request_is_where_the_documentation_says(file: str, function: str) -> None:
    place: Any = ast.parse((ROOT / "tether" / file).read_text())
    for name in function.split("."):
        found = [node for node in place.body if getattr(node, "name", "") == name]
        assert found, f"tether/{file} has no {function}"
        place = found[0]


def test_the_steps_of_a_request_a_run_and_a_push_are_documented() -> None:
    assert len(STEPS) > 30
