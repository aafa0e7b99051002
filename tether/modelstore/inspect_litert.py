"""The child of an inspection of a TensorFlow Lite model; see :mod:`tether.modelstore.limited`."""

from __future__ import annotations

import sys
from pathlib import Path

from tether.modelstore import inspect_framework, limited
from tether.modelstore.inspection import Inspection


def inspect(directory: Path) -> Inspection:
    """What the model is, after a few runs; raises as :func:`tether.modelstore.inspect_framework.look`."""
    return inspect_framework.look(directory, "litert_model", "litert")


if __name__ == "__main__":
    sys.exit(limited.main(sys.argv[1:], inspect, files=inspect_framework.FILES))
