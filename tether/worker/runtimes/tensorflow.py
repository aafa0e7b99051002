"""Loads TensorFlow SavedModels; see :mod:`tether.frameworks.tensorflow`."""

from __future__ import annotations

from pathlib import Path

from tether.domain.manifest import Manifest
from tether.frameworks import tensorflow
from tether.worker.runtimes.process_runtime import Options


def load(manifest: Manifest, directory: Path, options: Options) -> tensorflow.SavedModel:
    return tensorflow.load(directory, threads=options.threads, device=options.device, signature=manifest.signature)
