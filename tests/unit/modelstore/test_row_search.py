"""A search for graphs that are proven to keep rows apart and do not: drawn graphs, run alone and together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.models import row_graphs
from support.models.graphs import Spec, proof
from support.models.row_steps import STEPS

from tether.domain.manifest import TensorSpec
from tether.modelstore.inspection.row_trials import trial

GRAPHS = int(os.environ.get("TETHER_TEST_ROW_GRAPHS", "400"))
SEED = int(os.environ.get("TETHER_TEST_ROW_SEED", "1"))


def refuted(content: bytes, inputs: list[Spec]) -> str:
    """What speaks against it when it is run."""
    session = row_graphs.session(content)
    specs = [
        TensorSpec(name, datatype, (-1, *[size for size in shape[1:] if isinstance(size, int)]))
        for name, datatype, shape in inputs
    ]

    def run(arrays: Any) -> list[Any]:
        return list(session.run(None, dict(arrays)))

    return trial(run, specs, [one.name for one in session.get_outputs()], rows=True).refuted


def test_what_is_proven_of_drawn_graphs_holds(tmp_path: Path) -> None:
    proven, mixed, unseen = 0, 0, 0
    wrong: list[tuple[int, str]] = []
    for seed in range(SEED * 1_000_000, SEED * 1_000_000 + GRAPHS):
        made = row_graphs.drawn(seed, STEPS)
        if made is None:
            continue
        content, inputs = made
        independent, _ = proof(tmp_path, content)
        why = refuted(content, inputs)
        if independent:
            proven += 1
            if why:
                wrong.append((seed, why))
        elif why:
            mixed += 1
        else:
            unseen += 1
    assert wrong == []
    # The search is worth something only while it draws much of both.
    assert proven > GRAPHS // 8
    assert mixed > GRAPHS // 4
    assert unseen < proven + mixed


@pytest.mark.parametrize("seed", range(20))
def test_every_step_can_be_drawn(seed: int) -> None:
    assert row_graphs.drawn(seed, STEPS) is not None
