"""Loads Python bundles with their own class; see :mod:`tether.frameworks.python_bundle`."""

from __future__ import annotations

from pathlib import Path

from tether.domain.manifest import Manifest
from tether.frameworks.python_bundle import CustomModel, describe
from tether.worker.runtimes.process_runtime import Options


def load(_manifest: Manifest, directory: Path, _options: Options) -> CustomModel:
    """Return the runtime of a Python version. Runs its code: never in the worker's own process."""
    return CustomModel(directory, describe(directory))
