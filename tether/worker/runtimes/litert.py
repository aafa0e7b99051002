"""Loads TensorFlow Lite models with LiteRT; see :mod:`tether.frameworks.litert`."""

from __future__ import annotations

from pathlib import Path

from tether.domain.manifest import Manifest
from tether.frameworks import litert
from tether.worker.runtimes.process_runtime import Options


def load(manifest: Manifest, directory: Path, options: Options) -> litert.LiteModel:
    return litert.load(directory, threads=options.threads, device=options.device, signature=manifest.signature)
