"""What a file of PyTorch must be before PyTorch may see it, and the signatures of TorchScripts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tether.domain.manifest import TensorSpec
from tether.errors import FormatNotAllowed, InspectionLimitExceeded, ModelRejected
from tether.frameworks import pytorch_archive

X = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
EXPORTED = ("m/archive_format", "m/models/model.json", "m/data/weights/weight_0", "m/.data/version", "m/extra/notes")
SCRIPT = ("m/constants.pkl", "m/code/__torch__.py", "m/data.pkl")


def archive(path: Path, *members: str, content: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for member in members:
            made.writestr(member, content)
    return path.parent


def test_what_the_frameworks_write_is_let_through(tmp_path: Path) -> None:
    pytorch_archive.check(archive(tmp_path / "model.pt", *SCRIPT))
    pytorch_archive.check(archive(tmp_path / "model.pt2", *EXPORTED))


@pytest.mark.parametrize(
    "member",
    [
        "m/data/constants/opaque_obj_0",
        "m/data/constants/custom_obj_0",
        "m/data/constants/OPAQUE_OBJ_0",
        "m/data/constants/../opaque_obj_0",
        "m/data/aotinductor/model/model.so",
        "m/data/weights/weight_0/evil.so",
        "m/data.pkl",
        "serialized_state_dict.pt",
    ],
)
def test_an_exported_program_brings_nothing_else(tmp_path: Path, member: str) -> None:
    with pytest.raises(FormatNotAllowed, match="which no program of torch"):
        pytorch_archive.check(archive(tmp_path / "model.pt2", *EXPORTED, member))


@pytest.mark.parametrize("members", [("m/data.pkl",), ("m/data.pkl", "m/constants.pkl"), SCRIPT[1:]])
def test_what_torch_save_wrote_is_no_torchscript(tmp_path: Path, members: tuple[str, ...]) -> None:
    with pytest.raises(FormatNotAllowed, match=r"torch\.save writes pickled Python"):
        pytorch_archive.check(archive(tmp_path / "model.pt", *members))


def test_what_is_no_archive_or_swells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04\x95")
    with pytest.raises(FormatNotAllowed, match="is not what"):
        pytorch_archive.check(tmp_path)
    with pytest.raises(InspectionLimitExceeded, match="20 times"):
        pytorch_archive.check(archive(tmp_path / "model.pt", *SCRIPT, content=bytes(32 << 20)))


def test_a_signature_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"inputs": [X], "outputs": [{**X, "name": "y"}]}))
    found = pytorch_archive.signature(tmp_path, pytorch_archive.Signature)
    assert found.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert [spec.name for spec in found.outputs] == ["y"]


@pytest.mark.parametrize(
    "signature",
    [
        "[]",
        {"inputs": [X]},
        {"inputs": [X], "outputs": []},
        {"inputs": [X, X], "outputs": [X]},
        {"inputs": [X], "outputs": [{**X, "datatype": "BYTES"}]},
        {"inputs": [{**X, "shape": [-2]}], "outputs": [X]},
        {"inputs": [X], "outputs": [X], "className": "Model"},
    ],
)
def test_a_signature_that_says_too_little_or_too_much_is_refused(tmp_path: Path, signature: Any) -> None:
    (tmp_path / "model.json").write_text(json.dumps(signature))
    with pytest.raises(ModelRejected) as caught:
        pytorch_archive.signature(tmp_path, pytorch_archive.Signature)
    assert caught.value.field == "model.json"


def test_a_signature_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"model\.json"):
        pytorch_archive.signature(tmp_path, pytorch_archive.Signature)
