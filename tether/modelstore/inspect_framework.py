"""What inspections of PyTorch and TensorFlow models have in common: they load the model as a worker does, and try it."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from tether.errors import ModelLimits, ModelRejected, TetherError
from tether.modelstore import limited, warmup
from tether.modelstore.inspection import Inspection

FILES = 1024
"""Open at a time: the frameworks' own libraries and the model's files."""


def look(directory: Path, module: str, extra: str) -> Inspection:
    """Load with a module of the package ``tether`` that needs an extra of the package, and run a few times.

    Raises:
        ModelRejected: it cannot be served, or the framework is not installed here.
    """
    tempfile.tempdir = str(directory)  # the frameworks ask for one, and this process may not write to find it
    try:
        framework: Any = importlib.import_module(f"tether.{module}")
    except ImportError as error:
        raise ModelRejected(
            f"this model store cannot look at the model: {error.name} is not installed; install 'tether[{extra}]'"
        ) from error
    return tried(framework, directory)


def tried(framework: Any, directory: Path) -> Inspection:
    """What ``framework.load`` makes of a folder, after a few runs.

    Raises:
        ModelRejected: it cannot be loaded and run.
    """
    try:
        model = framework.load(directory, device="cpu")
        return warmup.judge(lambda arrays: model.run(arrays, ()), model.inputs, model.outputs)
    except (ModelRejected, MemoryError):
        raise
    except TetherError as error:
        raise ModelRejected(f"the model was refused: {error.message}", field="file") from error
    except Exception as error:
        if "allocate memory" in str(error) or "bad_alloc" in str(error):
            raise ModelLimits(limited.MEMORY, field="file") from error
        raise limited.refused("it cannot be loaded and run", error) from error
