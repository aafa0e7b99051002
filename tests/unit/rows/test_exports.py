"""What common exporters make of common models (``scripts/export_models.py``): whether it is batched, and that it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tether.frameworks.row_proof.prover import prove

EXPORTS = Path(__file__).parents[2] / "exports"
DIGITS = Path(__file__).parents[3] / "examples" / "digits" / "digits.onnx"
NOT_BATCHED = {
    "mlp_dynamic_int8": "DynamicQuantizeLinear (node 'x_QuantizeLinear') takes one scale from all rows",
    "sklearn_text": "Tokenizer (node 'Tokenizer') fills each text up to the longest of all rows",
}
FILES = sorted(path.stem for path in EXPORTS.glob("*.onnx"))
SIZES = {"time": 7, "sequence_length": 7, "num_channels": 3}
"""Of open axes by their names; others are 16, or 64 where the model halves them five times."""


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rows(model: Any, count: int, seed: int, other: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    found = {}
    for one in model.get_inputs():
        shape = [count, *(axis if isinstance(axis, int) else SIZES.get(axis, other) for axis in one.shape[1:])]
        if "int" in one.type:
            found[one.name] = draw.integers(0, 2 if "mask" in one.name or "type" in one.name else 40, shape)
            if "mask" in one.name:
                found[one.name][:, 0] = 1
        elif "string" in one.type:
            found[one.name] = draw.choice(np.array(["Ulm", "Bonn", "a good day"], np.object_), shape)
        else:
            scales = np.resize([1, 1e-3, 1e3, 10], count).reshape(-1, *[1] * (len(shape) - 1))
            found[one.name] = (draw.standard_normal(shape) * scales).astype(np.float32)
    return found


def test_there_are_as_many_as_the_table_in_the_documentation_names() -> None:
    table = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert [name for name in FILES if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", FILES)
def test_an_export_is_batched_unless_it_mixes_rows(name: str) -> None:
    independent, reason = prove(EXPORTS / f"{name}.onnx")
    assert independent == (name not in NOT_BATCHED)
    assert NOT_BATCHED.get(name, "") in reason


def test_the_demonstrations_model_is_batched() -> None:
    assert prove(DIGITS).independent


@pytest.mark.parametrize("name", [name for name in FILES if name not in NOT_BATCHED])
def test_rows_of_an_export_are_the_same_alone_and_together(name: str) -> None:
    model = session(EXPORTS / f"{name}.onnx")
    for seed, count in enumerate((2, 5, 8)):
        arrays = rows(model, count, seed, 64 if "yolo" in name else 16)
        together = model.run(None, arrays)
        for row in range(count):
            alone = model.run(None, {key: array[row : row + 1] for key, array in arrays.items()})
            for single, many in zip(alone, together, strict=True):
                assert len(many) == count
                if single.dtype.kind == "f":
                    scale = max(float(np.abs(single).max(initial=0)), 1e-9)
                    assert np.allclose(single[0], many[row], rtol=1e-3, atol=1e-3 * scale)
                else:
                    assert np.array_equal(single[0], many[row])
