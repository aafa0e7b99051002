"""The child process that inspects a SavedModel; see :mod:`tether.modelstore.inspection.sandbox`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tether.modelstore.inspection import sandbox
from tether.modelstore.inspection.file_formats import framework
from tether.modelstore.inspection.inspector import Inspection, Tell


def inspect(wanted: str, directory: Path, tell: Tell) -> Inspection:
    """Describe the model after a few runs; raises as
    :func:`tether.modelstore.inspection.file_formats.framework.load_and_try`.
    """
    return framework.load_and_try(directory, tell, "tensorflow", "tensorflow", signature=wanted)


if __name__ == "__main__":
    sys.exit(sandbox.main(sys.argv[1:], partial(inspect, sys.argv[5]), files=framework.FILES))
