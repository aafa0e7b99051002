"""LiteRT: TensorFlow Lite models; see :mod:`tether.litert_model`."""

from __future__ import annotations

from pathlib import Path

from tether import litert_model
from tether.model import Manifest
from tether.worker.runtimes.process import Options


def load(manifest: Manifest, directory: Path, options: Options) -> litert_model.LiteModel:
    return litert_model.load(directory, threads=options.threads, device=options.device, signature=manifest.signature)
