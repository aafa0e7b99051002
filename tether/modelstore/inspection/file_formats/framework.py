"""Inspection shared by PyTorch and TensorFlow models: load the model as a worker does, and run it."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tether.errors import InspectionLimitExceeded, ModelRejected, TetherError
from tether.modelstore.inspection import sandbox, trial_runs
from tether.modelstore.inspection.inspector import Inspection, Tell

FILES = 1024
"""Open files allowed: the framework's own libraries and the model's files."""


def load_and_try(directory: Path, tell: Tell, module: str, extra: str, **how: Any) -> Inspection:
    """Load with a module of ``tether`` that needs an extra of the package, and run a few times. ``how`` is passed to
    its ``load``.

    Raises:
        ModelRejected: it cannot be served, or the framework is not installed here.
    """
    if "TMPDIR" not in os.environ:
        tempfile.tempdir = str(
            directory
        )  # the frameworks need a home folder, and this process may not write to find one
    try:
        framework: Any = importlib.import_module(f"tether.frameworks.{module}")
    except ImportError as error:
        raise ModelRejected(
            f"this model store cannot inspect the model: {error.name} is not installed; install 'tether[{extra}]'"
        ) from error
    return tried(framework, directory, tell, **how)


def tried(framework: Any, directory: Path, tell: Tell, **how: Any) -> Inspection:
    """Load a folder with ``framework.load`` and return the result after a few runs.

    Raises:
        ModelRejected: it cannot be loaded and run.
    """
    try:
        loaded = framework.load(directory, device="cpu", **how)
        model = trial_runs.Model(lambda arrays: loaded.run(arrays, ()), loaded.inputs, loaded.outputs)
        found = trial_runs.judge(model, directory, tell)
        return replace(found, signature=getattr(loaded, "signature", ""), signatures=getattr(loaded, "signatures", ()))
    except (ModelRejected, MemoryError):
        raise
    except TetherError as error:
        raise ModelRejected(f"the model was refused: {error.message}", field="file") from error
    except Exception as error:
        if sandbox.is_memory(error):
            raise InspectionLimitExceeded(sandbox.MEMORY, field="file") from error
        raise sandbox.refused("it cannot be loaded and run", error) from error
