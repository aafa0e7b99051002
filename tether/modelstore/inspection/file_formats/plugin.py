"""The child process that inspects a model of a plugin's runtime; see :mod:`tether.modelstore.inspection.sandbox`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tether.frameworks import plugins
from tether.modelstore.inspection import sandbox
from tether.modelstore.inspection.file_formats import framework
from tether.modelstore.inspection.inspector import Inspection, Tell


def inspect(platform: str, directory: Path, tell: Tell) -> Inspection:
    """Describe the model after a few runs; raises as :func:`tether.frameworks.plugins.load` and
    :func:`~.inspect_framework.tried`.
    """
    runtime = plugins.load(plugins.RUNTIMES, platform, "runtime", "platform")
    return framework.tried(_Checking(runtime), directory, tell)


class _Checking:
    """Wraps the runtime to compare outputs as a worker does."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def load(self, directory: Path, *, device: str) -> plugins.Checked:
        return plugins.Checked(self._runtime.load(directory, device=device))


if __name__ == "__main__":
    sys.exit(sandbox.main(sys.argv[1:], partial(inspect, sys.argv[4]), files=framework.FILES))
