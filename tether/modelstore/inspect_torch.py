"""The child of an inspection of a PyTorch model; see :mod:`tether.modelstore.limited`."""

from __future__ import annotations

import sys
from pathlib import Path

from tether import torch_archive
from tether.modelstore import inspect_framework, limited
from tether.modelstore.inspection import Inspection, Tell


def inspect(directory: Path, tell: Tell) -> Inspection:
    """What the model is, after a few runs; raises as :func:`tether.torch_archive.check` and :func:`~.inspect_framework.look`."""
    torch_archive.check(directory)
    return inspect_framework.look(directory, tell, "torch_model", "torch")


if __name__ == "__main__":
    sys.exit(limited.main(sys.argv[1:], inspect, files=inspect_framework.FILES))
