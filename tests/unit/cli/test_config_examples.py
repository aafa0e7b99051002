"""The shipped examples are files a service would accept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tether import settings

CONFIG = Path(__file__).parents[3] / "config"
EXAMPLES = sorted(CONFIG.glob("*.json.example"))


def test_every_service_has_an_example() -> None:
    assert {path.name.split(".")[0] for path in EXAMPLES} == set(settings.SERVICES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid_on_top_of_its_service(example: Path, tmp_path: Path) -> None:
    service, *environment = example.name.removesuffix(".json.example").split(".")
    for path in CONFIG.glob(f"{service}.json.example"):
        shutil.copy(path, tmp_path / path.name.removesuffix(".example"))
    shutil.copy(example, tmp_path / example.name.removesuffix(".example"))
    chosen = {"environment": environment[0]} if environment else None
    settings.load(service, overrides=chosen, environ={}, config_dir=tmp_path)
