"""The child of an inspection of a SavedModel; see :mod:`tether.modelstore.limited`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tether.modelstore import inspect_framework, limited
from tether.modelstore.inspection import Inspection, Tell


def inspect(wanted: str, directory: Path, tell: Tell) -> Inspection:
    """What the model is, after a few runs; raises as :func:`tether.modelstore.inspect_framework.look`."""
    return inspect_framework.look(directory, tell, "tensorflow_model", "tensorflow", signature=wanted)


if __name__ == "__main__":
    sys.exit(limited.main(sys.argv[1:], partial(inspect, sys.argv[5]), files=inspect_framework.FILES))
