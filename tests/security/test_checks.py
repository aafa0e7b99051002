"""The checks of sources and dependencies find what they are there for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


SAFETY = script("check-safety")
DEPENDENCIES = script("check-dependencies")

PLANTED = [
    ("import pickle", "pickle"),
    ("import joblib.numpy_pickle", "joblib"),
    ("from cloudpickle import loads", "cloudpickle"),
    ("def f():\n    import dill as d", "dill"),
    ("import marshal, shelve", "marshal"),
    ("__import__('pickle')", "pickle"),
    ("import importlib\nimportlib.import_module('_pickle')", "_pickle"),
    ("eval('1')", "eval"),
    ("exec(code)", "exec"),
    ("compile(text, 'f', 'exec')", "compile"),
    ("import os\nos.system('ls')", "os.system"),
    ("from os import system as s\ns('ls')", "os.system"),
    ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
    ("import subprocess as sp\nsp.getoutput('ls')", "subprocess.getoutput"),
    ("import yaml\nyaml.load(text)", "yaml.load"),
    ("from yaml import load\nload(text)", "yaml.load"),
    ("import numpy as np\nnp.load(path)", "allow_pickle=False"),
    ("import numpy\nnumpy.load(path, allow_pickle=True)", "allow_pickle=True"),
    ("import numpy as anything\nanything.load(path)", "allow_pickle=False"),
    ("import torch\ntorch.load(path)", "weights_only=True"),
    ("import torch\ntorch.load(path, weights_only=False)", "weights_only=False"),
    ("import torch\ntorch.load(path, weights_only=choice)", "weights_only=True"),
    ("import ssl\nssl._create_unverified_context()", "unverified"),
    ("import ssl\ncontext.verify_mode = ssl.CERT_NONE", "CERT_NONE"),
    ("context.check_hostname = False", "check_hostname"),
    ("import httpx\nhttpx.get(url, verify=False)", "verify=False"),
    ("import tempfile\ntempfile.mktemp()", "mktemp"),
    ("archive.extractall(folder)", "extractall"),
    ("options.register_custom_ops_library(path)", "register_custom_ops_library"),
]


@pytest.mark.parametrize(("source", "word"), PLANTED, ids=[source for source, _ in PLANTED])
def test_what_is_planted_is_found(source: str, word: str) -> None:
    found = list(SAFETY.findings(source, "planted.py"))
    assert any(word in line and line.startswith("planted.py:") for line in found), found


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "text = 'import pickle; eval(1)'  # pickle",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import torch\ntorch.load(path, weights_only=True)",
        "from tether.domain.job import pickle",
        "model.eval()",
    ],
)
def test_what_is_harmless_is_not(source: str) -> None:
    assert list(SAFETY.findings(source, "fine.py")) == []


def test_the_project_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert SAFETY.main() == 0, capsys.readouterr().out


def test_a_package_that_is_too_old_is_found_and_one_that_is_missing_is_not() -> None:
    packages = [{"name": "a", "minimum": "1.10", "advisory": "X-1", "why": "it leaks"}]
    (line,) = DEPENDENCIES.outdated(packages, {"a": "1.9.9"}.get)
    assert "a 1.9.9 is older than 1.10 (X-1: it leaks)" in line
    assert list(DEPENDENCIES.outdated(packages, {"a": "1.10"}.get)) == []
    assert list(DEPENDENCIES.outdated(packages, {"b": "0"}.get)) == []


def test_an_audit_that_looked_at_nothing_is_no_clean_bill() -> None:
    skipped = {"name": "a", "skip_reason": "not found"}
    assert "nothing was audited" in next(DEPENDENCIES.vulnerable({"dependencies": [skipped]}))
    assert "nothing was audited" in next(DEPENDENCIES.vulnerable({}))
    bad = {"name": "b", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
    assert list(DEPENDENCIES.vulnerable({"dependencies": [skipped, bad]})) == ["b 1: X-1, fixed in 2"]
    assert list(DEPENDENCIES.vulnerable({"dependencies": [{"name": "c", "version": "1", "vulns": []}]})) == []


def test_what_is_installed_is_new_enough_and_fits_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert DEPENDENCIES.main([]) == 0, capsys.readouterr().out


WORDS = script("check-words")


def test_retired_words_are_found_with_the_ones_to_use() -> None:
    text = "class X(ModelInstance): ...\nTETHER_WORKER_SLOTS=2\ntether_limited_total\nthe code `bad_seal`\nmodel pieces\nfine"
    assert [line.split(": ")[0] for line in WORDS.findings("x.py", text)] == [
        f"x.py:{number}" for number in range(1, 6)
    ]
    assert "'worker_prefetch'" in next(WORDS.findings("x", "TETHER_WORKER_SLOTS"))


def test_a_chunk_may_be_called_a_piece_on_the_wire_alone() -> None:
    assert not list(WORDS.findings("tether/wire/subjects.py", ".piece."))
    assert list(WORDS.findings("tether/wire/oip.py", ".piece."))
