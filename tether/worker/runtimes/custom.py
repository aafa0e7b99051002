"""Python bundles with a class of their own; see :mod:`tether.custom`."""

from __future__ import annotations

from pathlib import Path

from tether.custom import CustomModel, describe
from tether.model import Manifest
from tether.worker.runtimes.process import Options


def load(_manifest: Manifest, directory: Path, _options: Options) -> CustomModel:
    """The runtime of a Python version. Runs its code: never in the worker's own process."""
    return CustomModel(directory, describe(directory))
