"""What a path is pushed as: which files, under which names, and what is said of what cannot be pushed."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from tether.client.pushing.local_model import FORMATS, LocalModel, local_model, read_chunk
from tether.errors import InvalidRequest

SIGNATURE = json.dumps({"inputs": [], "outputs": []})


def files(found: LocalModel) -> dict[str, bytes]:
    return {file.path: file.source.read_bytes() for file in found.files}


def refusal(path: Path) -> str:
    with pytest.raises(InvalidRequest) as caught:
        local_model(path)
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize("suffix", [".jit", ".torchscript", ".ts", ".pt", ".PT"])
def test_every_end_of_torchscript_is_taken_with_its_description(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"net{suffix}").write_bytes(b"PK")
    (tmp_path / "net.json").write_text(SIGNATURE)
    found = local_model(tmp_path / f"net{suffix}")
    assert (found.platform, list(files(found))) == ("pytorch_libtorch", ["model.pt", "model.json"])


@pytest.mark.parametrize("name", ["resnet50-v2.onnx", "best (1).onnx", "Größe.ONNX"])
def test_a_folder_with_one_model_of_another_name_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"graph")
    (tmp_path / "weights.bin").write_bytes(b"w")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.onnx_data").write_bytes(b"v")
    (tmp_path / "config.json").write_text("{}")
    found = local_model(tmp_path)
    assert found.platform == "onnxruntime_onnx"
    assert files(found) == {"model.onnx": b"graph", "weights.bin": b"w", "sub/more.onnx_data": b"v"}
    assert found.skipped == ("config.json",)


def test_a_lite_model_is_taken_from_among_its_papers(tmp_path: Path) -> None:
    (tmp_path / "detect.tflite").write_bytes(b"T")
    (tmp_path / "labelmap.txt").write_text("cat")
    found = local_model(tmp_path)
    assert (found.platform, files(found), found.skipped) == (
        "tensorflow_lite",
        {"model.tflite": b"T"},
        ("labelmap.txt",),
    )


def test_a_described_model_of_another_name_brings_its_description(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"P")
    (tmp_path / "net.json").write_text(SIGNATURE)
    assert set(files(local_model(tmp_path))) == {"model.pt", "model.json"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("model.safetensors", "in model.json beside it"), ("net.pt", "in net.json or model.json beside it")],
)
def test_a_folder_whose_model_nobody_describes_is_told_as_its_file_is(tmp_path: Path, name: str, wanted: str) -> None:
    """As a folder of sentence-transformers, which has weights and settings."""
    folder = tmp_path / "minilm"
    folder.mkdir()
    (folder / name).write_bytes(b"P")
    for other in ("config.json", "tokenizer.json", ".gitattributes"):
        (folder / other).write_text("{}")
    for path in (folder, folder / name):
        message = refusal(path)
        assert f"'{name}' does not contain its signature; describe it {wanted}" in message
    assert ("optimum-cli export onnx" in message) == (name == "model.safetensors")


def test_of_several_models_the_folder_must_say_which(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"g")
    message = refusal(tmp_path)
    assert "'a.onnx', 'b.onnx'" in message
    assert "model.onnx" in message


def test_a_python_bundle_may_have_empty_files_hidden_ones_are_left_out_and_a_model_in_it_is_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.json").write_text('{"className": "M"}')
    (tmp_path / "model.py").write_text("class M: ...")
    (tmp_path / "model.onnx").write_bytes(b"its own")
    for folder in ("pkg", ".git", "pkg/__pycache__"):
        (tmp_path / folder).mkdir()
    for name in (
        "pkg/__init__.py",
        ".gitattributes",
        ".git/config",
        "pkg/.DS_Store",
        "pkg/__pycache__/x.pyc",
        "a b (1).txt",
    ):
        (tmp_path / name).touch()
    found = local_model(tmp_path)
    assert found.platform == "python"
    assert set(files(found)) == {"model.json", "model.py", "model.onnx", "pkg/__init__.py", "a b (1).txt"}
    assert found.skipped == (".git", ".gitattributes", "pkg/.DS_Store")


@pytest.mark.parametrize("kind", ["file", "folder", "hidden target", "nothing"])
@pytest.mark.parametrize("where", ["", "sub"])
def test_a_link_in_a_folder_is_never_followed(tmp_path: Path, kind: str, where: str) -> None:
    (tmp_path / "secret").write_bytes(b"private")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_bytes(b"private")
    (tmp_path / ".ssh").write_bytes(b"private")
    target = {"file": "secret", "folder": "other", "hidden target": ".ssh", "nothing": "gone"}[kind]
    folder = tmp_path / "m"
    (folder / where).mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"g")
    (folder / where / "w.bin").symlink_to(tmp_path / target)
    message = refusal(folder)
    assert "w.bin' is a symbolic link" in message
    assert "cp -rL" in message


@pytest.mark.parametrize("name", ["link.onnx", "folder", "net.pt"])
def test_a_link_is_not_followed_where_the_path_itself_or_a_description_is_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "real.onnx").write_bytes(b"g")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.onnx").write_bytes(b"g")
    if name == "net.pt":
        (tmp_path / name).write_bytes(b"P")
        (tmp_path / "net.json").symlink_to(tmp_path / "real.onnx")
    else:
        (tmp_path / name).symlink_to(tmp_path / ("real.onnx" if name == "link.onnx" else "real"))
    assert "is a symbolic link" in refusal(tmp_path / name)


def test_a_link_that_takes_a_files_place_meanwhile_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"graph")
    (file,) = local_model(path).files
    (tmp_path / "secret").write_bytes(b"private")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_chunk(file.source, 0, 5)


def test_what_is_no_plain_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"g")
    os.mkfifo(tmp_path / "pipe")
    assert "'pipe' in the folder is not a regular file" in refusal(tmp_path)
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["two\nlines", "a\\b", "\udc80"])
def test_a_name_that_cannot_be_stored_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"g")
    (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert ascii(name) in message
    assert "rename it" in message


def test_what_is_not_there_or_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "gone" / "m.onnx")
    (tmp_path / "file").touch()
    assert "no such file or folder" in refusal(tmp_path / "file" / "m.onnx")
    assert "cannot read" in refusal(tmp_path / ("x" * 300 + ".onnx"))


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_an_empty_model_file_is_told_as_that(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.touch()
    (tmp_path / "m.json").write_text(SIGNATURE)
    message = refusal(path)
    assert "is empty: it has 0 bytes" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.h5", "keras.saving.load_model('net.h5').export('net')"),
        ("net.keras", "push the folder net"),
        ("forest.pkl", "skl2onnx.to_onnx"),
        ("forest.joblib", "pickles are never loaded"),
        ("net.pth", "torch.onnx.export(model, args, 'net.onnx', dynamo=True)"),
        ("net.ckpt", "torch.export.save"),
        ("frozen.pb", "python -m tf2onnx.convert --graphdef frozen.pb --output frozen.onnx"),
        ("net.cbm", "model.save_model('net.onnx', format='onnx')"),
        ("net.ubj", "convert_xgboost"),
        ("net.lgb", "zipmap=False"),
        ("net.pdmodel", "paddle2onnx"),
        ("net.engine", "push the ONNX file that it was built from"),
        ("net.tar.gz", "unpack it"),
        ("net.gguf", "llama.cpp"),
        ("net.mlmodel", "convert_coreml"),
        ("net.xyz", "expected a file with the extension .onnx"),
    ],
)
def test_what_needs_conversion_is_told_with_the_command(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path / name)
    if not words.startswith("expected"):
        assert words in refusal(tmp_path)


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    assert "has no model; expected one of model.onnx" in refusal(tmp_path)
    (tmp_path / "model.json").write_text("[" * 100_000)
    assert "model.json, but no model.py" in refusal(tmp_path)


def test_a_pickle_that_calls_itself_torchscript_is_told_as_that_and_a_script_how_to_describe_it(tmp_path: Path) -> None:
    pickled, script = tmp_path / "pickled.pt", tmp_path / "script.pt"
    for path, member in ((pickled, "pickled/data.pkl"), (script, "script/code/__torch__.py")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"x")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02")
    for path in (pickled, tmp_path / "old.pt"):
        assert "torch.export.save" in refusal(path)
        assert "beside it" not in refusal(path)
    assert 'in script.json or model.json beside it, as in {"inputs": [{"name": "x", ' in refusal(script)
