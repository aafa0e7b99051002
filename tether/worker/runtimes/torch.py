"""PyTorch: programs of ``torch.export``, TorchScript, and weights of installed architectures; see :mod:`tether.torch_model`."""

from __future__ import annotations

from pathlib import Path

from tether import torch_model
from tether.model import Manifest
from tether.worker.runtimes.process import Options


def load(manifest: Manifest, directory: Path, options: Options) -> torch_model.TorchModel:
    if options.compile:
        from tether.worker.runtimes import compiled  # noqa: PLC0415 - few compile, and all others would wait for its imports

        return compiled.load(manifest, directory, options)
    return torch_model.load(directory, threads=options.threads, device=options.device)
