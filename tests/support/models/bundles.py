"""Python models as folders, each with one habit that a test needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FP32 = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
CODE = """
import ctypes, os, socket, sys, time
import numpy as np


class Model:
    def load(self, directory):
        self.bias = float((directory / "data" / "bias.txt").read_text())

    def predict(self, inputs):
        x = inputs["x"]
        print("models may print", flush=True)
        first = float(x.min()) if x.size else 0.0
        if first == -1:
            os.abort()
        if first == -2:
            ctypes.string_at(0)
        if first == -3:
            while True:
                time.sleep(0.01)
        if first == -4:
            raise ValueError("no such luck in /secret/place")
        if first == -5:
            return {"y": [bytearray(1 << 40)]}
        if first == -6:
            sys.exit(3)
        if first == -7:
            socket.create_connection(("192.0.2.1", 80), 0.2)
        if first == -8:
            return {"y": x[:, :1]}
        if first == -9:
            return {"y": np.full_like(x, os.getpid() % 65536)}
        if first == -11:
            return {"y": np.zeros((int(x.max()), 4), np.float32)}
        if first == -10:
            held = []
            while True:
                held.append(np.empty(1 << 25))
        return {"y": x + np.float32(self.bias)}
"""


def write(folder: Path, *, bias: float = 0.5, code: str = CODE, **changes: Any) -> Path:
    """A bundle that adds ``bias`` to each element, and misbehaves when the first element is negative."""
    description = {
        "className": "Model",
        "inputs": [FP32],
        "outputs": [{**FP32, "name": "y"}],
        "maxBatchSize": 8,
        **changes,
    }
    (folder / "data").mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "model.py").write_text(code)
    (folder / "data" / "bias.txt").write_text(str(bias))
    return folder
