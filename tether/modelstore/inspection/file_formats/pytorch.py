"""The child process that inspects a PyTorch model; see :mod:`tether.modelstore.inspection.sandbox`."""

from __future__ import annotations

import sys
from pathlib import Path

from tether.frameworks import pytorch_archive
from tether.modelstore.inspection import sandbox
from tether.modelstore.inspection.file_formats import framework
from tether.modelstore.inspection.inspector import Inspection, Tell


def inspect(directory: Path, tell: Tell) -> Inspection:
    """Describe the model after a few runs; raises as :func:`tether.frameworks.pytorch_archive.check` and
    :func:`~.inspect_framework.load_and_try`.
    """
    pytorch_archive.check(directory)
    return framework.load_and_try(directory, tell, "pytorch", "torch")


if __name__ == "__main__":
    sys.exit(sandbox.main(sys.argv[1:], inspect, files=framework.FILES))
