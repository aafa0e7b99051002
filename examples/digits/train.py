"""Train a small classifier of handwritten digits and write it as ONNX.

Run ``python examples/digits/train.py``: it makes ``digits.onnx`` and ``digits_holdout.npz`` beside this file, the same
bytes every time with the same library versions. The images are the 8x8 digits bundled with scikit-learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).resolve().parent
BRIGHTEST = 16.0
"""Pixels are 0 to 16; the network sees 0 to 1."""
HIDDEN = 128
FLOOR = 0.95


def train(images: Any, labels: Any) -> MLPClassifier:
    """Fit the network; ``images`` is [n, 64] with pixels 0 to 16."""
    network = MLPClassifier(hidden_layer_sizes=(HIDDEN,), alpha=1e-3, max_iter=400, tol=1e-4, random_state=7)
    return network.fit(images / BRIGHTEST, labels)


def to_onnx(network: MLPClassifier) -> onnx.ModelProto:
    """The fitted network as a graph: ``image`` FP32 [n, 64] -> ``label`` INT64 [n], ``probabilities`` FP32 [n, 10]."""
    weights = {
        "brightest": np.array(BRIGHTEST),
        "w1": network.coefs_[0],
        "b1": network.intercepts_[0],
        "w2": network.coefs_[1],
        "b2": network.intercepts_[1],
    }
    graph = helper.make_graph(
        [
            helper.make_node("Div", ["image", "brightest"], ["scaled"]),
            helper.make_node("Gemm", ["scaled", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
        ],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, producer_name="tether-example", opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    digits = load_digits()
    images, holdout, labels, truth = train_test_split(
        digits.data.astype(np.float32), digits.target, test_size=0.25, random_state=7, stratify=digits.target
    )
    network = train(images, labels)
    accuracy = network.score(holdout / BRIGHTEST, truth)
    if accuracy < FLOOR:
        raise SystemExit(f"accuracy on the held-out images is {accuracy:.3f}, below {FLOOR}")
    onnx.save(to_onnx(network), str(HERE / "digits.onnx"))
    np.savez_compressed(HERE / "digits_holdout.npz", images=holdout, labels=truth.astype(np.int64))
    print(f"digits.onnx: accuracy {accuracy:.3f} on {len(truth)} held-out images")


if __name__ == "__main__":
    main()
