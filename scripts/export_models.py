"""Write the small models of tests/exports: what common exporters make of common models, with random weights and few layers.

It needs packages that nothing else here needs, so it runs in an environment of its own:

    python -m venv exporters
    exporters/bin/pip install torch==2.14.1 torchvision==0.29.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 \
        transformers==4.57.6 optimum-onnx==0.1.0 scikit-learn==1.9.1 skl2onnx==1.20.0 onnxmltools==1.16.0 \
        lightgbm==4.7.0 xgboost==3.2.0 ultralytics==8.4.190 pandas
    exporters/bin/python scripts/export_models.py tests/exports [NAME ...]
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import export_large
import export_tables
import export_torch
import numpy as np

MAKERS = {**export_torch.MAKERS, **export_large.MAKERS, **export_tables.MAKERS}


def strip(path: Path) -> None:
    """Take away what no runtime reads: where in a program each node comes from."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.save(model, path)


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    folder.mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    failed = 0
    for name in arguments[1:] or MAKERS:
        np.random.seed(0)  # noqa: NPY002 - scikit-learn draws from it
        try:
            import torch

            torch.manual_seed(0)
            MAKERS[name](folder / f"{name}.onnx")
            strip(folder / f"{name}.onnx")
            print(f"{name}: {(folder / f'{name}.onnx').stat().st_size} bytes")
        except Exception as error:  # noqa: BLE001 - the others are made all the same
            failed += 1
            print(f"{name}: failed: {type(error).__name__}: {str(error)[:300]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
