"""The architecture ``digits-mlp``: what the weights in a ``model.safetensors`` belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Digits(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Two layers; returns a dictionary, whose keys are the names of the outputs."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, hidden)
        self.second = torch.nn.Linear(hidden, 10)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.second(torch.relu(self.first(image / 16.0)))
        return {"label": scores.argmax(dim=1), "probabilities": torch.softmax(scores, dim=1)}


def build(config: Mapping[str, Any]) -> torch.nn.Module:
    """``config`` is what the pusher wrote into ``model.json``, so it is looked at like any input."""
    hidden = config.get("hidden", 32)
    if not isinstance(hidden, int) or not 1 <= hidden <= 4096:
        raise ValueError("config.hidden must be 1 to 4096")
    return Digits(hidden)
