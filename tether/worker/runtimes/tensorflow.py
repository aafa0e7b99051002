"""TensorFlow: SavedModels; see :mod:`tether.tensorflow_model`."""

from __future__ import annotations

from pathlib import Path

from tether import tensorflow_model
from tether.model import Manifest
from tether.worker.runtimes.process import Options


def load(manifest: Manifest, directory: Path, options: Options) -> tensorflow_model.SavedModel:
    return tensorflow_model.load(
        directory, threads=options.threads, device=options.device, signature=manifest.signature
    )
