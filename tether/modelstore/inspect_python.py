"""The child of an inspection of a Python bundle; called as :mod:`tether.modelstore.inspect_onnx` is.

It runs the bundle's code: once, on zeros, under the limits of an inspection.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tether.custom import CustomModel, describe
from tether.modelstore import limited, trials
from tether.modelstore.inspection import Inspection


def inspect(directory: Path) -> Inspection:
    """What the bundle is, after one run.

    Raises:
        ModelRejected: its description or its code is not as it should be.
    """
    said = describe(directory)
    model = CustomModel(directory, said)
    try:
        model.run(trials.zeros(said.inputs), ())
    except MemoryError:
        raise
    except Exception as error:
        raise limited.refused("its warm-up run failed", error) from error
    note = "" if said.max_batch_size else "its description sets no maxBatchSize"
    return Inspection(said.inputs, said.outputs, said.max_batch_size, note)


if __name__ == "__main__":
    sys.exit(limited.main(sys.argv[1:], inspect))
