"""Installed packages against known vulnerabilities, and against one another.

Without arguments it needs no network, so that it says the same everywhere: every package of ``ops/advisories.toml`` that
is installed must be new enough, and what is installed must fit together (``pip check``). With ``--online`` pip-audit asks
its advisory service too; an answer that covers no package is a failure, not a clean bill.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

ADVISORIES = Path(__file__).resolve().parent.parent / "ops" / "advisories.toml"


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def outdated(packages: list[Mapping[str, str]], version_of: Callable[[str], str | None]) -> Iterator[str]:
    """One line for every package that is installed and too old."""
    for package in packages:
        found = version_of(package["name"])
        if found is not None and Version(found) < Version(package["minimum"]):
            yield (
                f"{package['name']} {found} is older than {package['minimum']} "
                f"({package['advisory']}: {package['why']}); upgrade it"
            )


def vulnerable(report: Mapping[str, Any]) -> Iterator[str]:
    """One line for every vulnerability in a report of pip-audit; one when it looked at nothing."""
    packages = report.get("dependencies", [])
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        yield f"the advisory service knows none of {len(packages)} packages; nothing was audited"
    for package in audited:
        for found in package.get("vulns", []):
            fixes = ", ".join(found.get("fix_versions", [])) or "no version yet"
            yield f"{package['name']} {package['version']}: {found['id']}, fixed in {fixes}"


def _fit() -> Iterator[str]:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if done.returncode:
        yield from done.stdout.splitlines() or [done.stderr.strip()]


def _online() -> Iterator[str]:
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        yield f"pip-audit gave no report: {reason[0]}"
        return
    yield from vulnerable(report)


def main(arguments: list[str]) -> int:
    """Print what is wrong; 1 when anything is."""
    packages = tomllib.loads(ADVISORIES.read_text())["package"]
    complaints = [*outdated(packages, installed), *_fit()]
    if "--online" in arguments:
        complaints += _online()
    for complaint in complaints:
        print(complaint)
    print(f"dependencies: {len(packages)} advisories, {len(complaints)} findings", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
