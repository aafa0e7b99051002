"""Files that end too early are told by their name, and whole ones pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tether.errors import ModelRejected
from tether.frameworks.truncated_files import check_safetensors, check_saved_model

SAVED = b"\x08\x01\x12\x05graph"
INDEX = b"an index of some bytes" + bytes.fromhex("57fb808b247547db")


def weights() -> bytes:
    values = np.arange(6, dtype="<f4").tobytes()
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, len(values)]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + values


def saved(folder: Path, graph: bytes = SAVED, index: bytes = INDEX) -> Path:
    (folder / "variables").mkdir()
    (folder / "saved_model.pb").write_bytes(graph)
    (folder / "variables" / "variables.index").write_bytes(index)
    return folder


def test_whole_files_pass(tmp_path: Path) -> None:
    check_saved_model(saved(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights())
    check_safetensors(path)


@pytest.mark.parametrize("left", [1, 3, 4, len(SAVED) - 1])
def test_a_graph_of_a_saved_model_that_is_cut_off_is_told(tmp_path: Path, left: int) -> None:
    with pytest.raises(ModelRejected, match=rf"'saved_model.pb' is cut off: it ends after {left} bytes"):
        check_saved_model(saved(tmp_path, SAVED[:left]))


def test_a_saved_model_that_is_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"'saved_model.pb' is not what tf.saved_model.save writes"):
        check_saved_model(saved(tmp_path, b"\x00\x00"))


def test_an_index_of_variables_that_is_cut_off_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"'variables/variables.index' is cut off: it ends after 20 bytes"):
        check_saved_model(saved(tmp_path, index=INDEX[:20]))


@pytest.mark.parametrize("left", [0, 7, 8, 60, len(weights()) - 1])
def test_weights_that_are_cut_off_are_told(tmp_path: Path, left: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights()[:left])
    with pytest.raises(ModelRejected, match=rf"'model.safetensors' is cut off: it ends after {left} bytes"):
        check_safetensors(path)


def test_what_is_no_file_of_weights_is_left_to_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    check_safetensors(path)
