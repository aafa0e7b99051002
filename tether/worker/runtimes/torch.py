"""Loads ``torch.export`` programs, TorchScript and known weights, see :mod:`tether.frameworks.pytorch`."""

from __future__ import annotations

from pathlib import Path

from tether.domain.manifest import Manifest
from tether.frameworks import pytorch
from tether.worker.runtimes.process_runtime import Options


def load(manifest: Manifest, directory: Path, options: Options) -> pytorch.TorchModel:
    if options.compile:
        from tether.worker.runtimes import torch_compile  # noqa: PLC0415 - its imports are slow and few models compile

        return torch_compile.load(manifest, directory, options)
    return pytorch.load(directory, threads=options.threads, device=options.device)
