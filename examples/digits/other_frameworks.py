"""Write the network of ``digits.onnx`` for the other platforms: torch.export, TorchScript, SavedModel, TensorFlow Lite and a Python class,
as ONNX with its weights in a file of their own, and for the plugins of ``examples/plugin``.

Run ``python examples/digits/other_frameworks.py FOLDER torch tensorflow python onnx npz``, with the frameworks of your choice; what it writes is
pushed with ``tether model push digits FOLDER/...``. The extras ``torch`` and ``tensorflow`` have the frameworks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnx
    from onnx import numpy_helper
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed; install it with: {sys.executable} -m pip install onnx") from error

HERE = Path(__file__).resolve().parent
INPUTS = [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]
OUTPUTS = [
    {"name": "label", "datatype": "INT64", "shape": [-1]},
    {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
]
BRIGHTEST = 16.0
CLASS = '''"""The digits network in numpy."""

import numpy as np


class Digits:
    def load(self, directory):
        with np.load(directory / "weights.npz") as weights:
            self.weights = dict(weights)

    def predict(self, inputs):
        w = self.weights
        hidden = np.maximum(inputs["image"] / np.float32(16) @ w["w1"] + w["b1"], 0)
        scores = hidden @ w["w2"] + w["b2"]
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        return {"label": scores.argmax(axis=1), "probabilities": raised / raised.sum(axis=1, keepdims=True)}
'''

Weights = Mapping[str, npt.NDArray[np.float32]]


def weights() -> Weights:
    """``w1``, ``b1``, ``w2`` and ``b2`` of the trained network."""
    graph = onnx.load(str(HERE / "digits.onnx")).graph
    return {value.name: np.array(numpy_helper.to_array(value)) for value in graph.initializer}


def torch_network(found: Weights) -> Any:
    """The network as a module that takes ``image`` and returns a dictionary."""
    import torch

    class Digits(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            for name in ("w1", "b1", "w2", "b2"):
                self.register_buffer(name, torch.from_numpy(found[name]))

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = torch.relu(image / 16.0 @ self.w1 + self.b1)
            scores = hidden @ self.w2 + self.b2
            return {"label": scores.argmax(dim=1), "probabilities": torch.softmax(scores, dim=1)}

    return Digits().eval()


def write_torch(folder: Path, found: Weights) -> None:
    """``digits.pt2`` of torch.export; ``digits.pt`` of TorchScript with the signature that it lacks in ``digits.json``;
    the folder ``safetensors`` for the architecture of ``examples/plugin``.
    """
    import torch
    from safetensors.torch import save_file

    network, example = torch_network(found), torch.zeros(2, 64)
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(network, (example,), dynamic_shapes={"image": {0: rows}})
    torch.export.save(program, folder / "digits.pt2")
    torch.jit.trace(network, (example,), strict=False).save(folder / "digits.pt")
    (folder / "digits.json").write_text(json.dumps({"inputs": INPUTS, "outputs": OUTPUTS}, indent=2))
    layers = {
        "first.weight": found["w1"].T,
        "first.bias": found["b1"],
        "second.weight": found["w2"].T,
        "second.bias": found["b2"],
    }
    weights_only = folder / "safetensors"
    weights_only.mkdir()
    tensors = {name: torch.from_numpy(np.array(value, order="C")) for name, value in layers.items()}
    save_file(tensors, weights_only / "model.safetensors")
    description = {
        "architecture": "digits-mlp",
        "config": {"hidden": len(found["b1"])},
        "inputs": INPUTS,
        "outputs": OUTPUTS,
    }
    (weights_only / "model.json").write_text(json.dumps(description, indent=2))


def write_tensorflow(folder: Path, found: Weights) -> None:
    """The folder ``savedmodel``, and ``digits.tflite`` converted from it."""
    import tensorflow as tf

    network = tf.Module()
    w1, b1, w2, b2 = network.parts = [tf.Variable(found[name]) for name in ("w1", "b1", "w2", "b2")]

    def classify(image: Any) -> dict[str, Any]:
        scores = tf.nn.relu(image / BRIGHTEST @ w1 + b1) @ w2 + b2
        return {"label": tf.argmax(scores, axis=1), "probabilities": tf.nn.softmax(scores)}

    served = tf.function(classify, input_signature=[tf.TensorSpec([None, 64], tf.float32, name="image")])
    tf.saved_model.save(network, str(folder / "savedmodel"), signatures=served)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "savedmodel"))
    (folder / "digits.tflite").write_bytes(converter.convert())


def write_python(folder: Path, found: Weights) -> None:
    """The folder ``python``: a class, its description and its weights."""
    bundle = folder / "python"
    bundle.mkdir()
    description = {"className": "Digits", "inputs": INPUTS, "outputs": OUTPUTS, "maxBatchSize": 512}
    (bundle / "model.json").write_text(json.dumps(description, indent=2))
    (bundle / "model.py").write_text(CLASS)
    np.savez(bundle / "weights.npz", w1=found["w1"], b1=found["b1"], w2=found["w2"], b2=found["b2"])


def write_npz(folder: Path, found: Weights) -> None:
    """The folder ``npz``, for the runtime ``numpy_npz`` of ``examples/plugin``."""
    (folder / "npz").mkdir()
    (folder / "npz" / "model.json").write_text(json.dumps({"platform": "numpy_npz"}))
    np.savez(folder / "npz" / "weights.npz", w1=found["w1"], b1=found["b1"], w2=found["w2"], b2=found["b2"])


def write_onnx(folder: Path, _found: Weights) -> None:
    """The folder ``external``: ``model.onnx``, and its weights in ``weights.bin``."""
    (folder / "external").mkdir()
    target = str(folder / "external" / "model.onnx")
    network = onnx.load(str(HERE / "digits.onnx"))
    onnx.save(network, target, save_as_external_data=True, location="weights.bin", size_threshold=0)


WRITERS = {
    "onnx": write_onnx,
    "torch": write_torch,
    "tensorflow": write_tensorflow,
    "python": write_python,
    "npz": write_npz,
}


def main() -> None:
    if len(sys.argv) < 3 or not set(sys.argv[2:]) <= set(WRITERS):
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER {' '.join(WRITERS)}")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:]:
        try:
            WRITERS[name](folder, weights())
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"{name} needs the package {error.name}; see 'PyTorch and TensorFlow' in docs/models.md"
            ) from error


if __name__ == "__main__":
    main()
