"""The child process that inspects a Python bundle; called like
:mod:`tether.modelstore.inspection.file_formats.onnx`.

It runs the bundle's code under the limits of an inspection: imports it, creates its class, runs it once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from msgspec.structs import replace

from tether.errors import ModelRejected, OutputMisfit
from tether.frameworks.python_bundle import CustomModel, describe, found_class
from tether.modelstore.inspection import sandbox
from tether.modelstore.inspection.inspector import IMPORTING, MAKING, Inspection, InspectionReport, Tell
from tether.modelstore.inspection.trial_runs import Model, judge


def inspect(directory: Path, tell: Tell) -> Inspection:
    """Describe the bundle after one run.

    Raises:
        ModelRejected: its description or its code is invalid.
    """
    said = describe(directory)
    tell(InspectionReport(doing=IMPORTING))
    found_class(directory, said)
    tell(InspectionReport(doing=MAKING))
    model = CustomModel(directory, said)
    try:
        tried = judge(
            Model(lambda arrays: model.run(arrays, ()), said.inputs, said.outputs), directory, tell, compare=False
        )
    except OutputMisfit as error:
        raise ModelRejected(f"the model was refused: {error.message}", field="file") from error
    note = "" if said.max_batch_size else "its description sets no maxBatchSize"
    return replace(tried, max_batch_size=said.max_batch_size, note=note)


if __name__ == "__main__":
    sys.exit(sandbox.main(sys.argv[1:], inspect))
