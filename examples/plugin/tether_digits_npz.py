"""The runtime of the platform ``numpy_npz``: a folder with ``model.json`` and the weights of two layers in ``weights.npz``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tether.domain.manifest import TensorSpec
from tether.errors import InferenceFailed, ModelRejected


class Network:
    """What Tether calls: the signature, ``run`` and ``close``."""

    inputs = (TensorSpec("image", "FP32", (-1, 64)),)
    outputs = (TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 10)))
    output_names = ("label", "probabilities")

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """One array for each name in ``outputs``; for all of ``output_names`` when that is empty."""
        weights, image = self._weights, inputs["image"]
        if not np.isfinite(image).all():
            raise InferenceFailed("input 'image' has values that are no numbers")
        scores = np.maximum(image / np.float32(16) @ weights["w1"] + weights["b1"], 0) @ weights["w2"] + weights["b2"]
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        found = {"label": scores.argmax(axis=1), "probabilities": raised / raised.sum(axis=1, keepdims=True)}
        return [found[name] for name in outputs or self.output_names]

    def close(self) -> None:
        """The process ends after this; a runtime that holds more than memory lets it go here."""
        self._weights = {}


def load(directory: Path, *, threads: int = 1, device: str = "auto") -> Network:
    """Called once, in the model's own process, with the folder of the version's files."""
    del threads, device  # numpy has the threads of its environment, and runs on the processor
    try:
        with np.load(directory / "weights.npz", allow_pickle=False) as found:
            weights = {name: found[name] for name in ("w1", "b1", "w2", "b2")}
    except (OSError, ValueError, KeyError) as error:
        raise ModelRejected("there must be a file weights.npz with w1, b1, w2 and b2", field="files") from error
    return Network(weights)
