"""Models of PyTorch and TensorFlow over HTTP: their answers are those of the framework, and who may push them."""

from __future__ import annotations

import json
import runpy
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.http.served import Served, until
from support.models import frameworks, models

from tether import Client
from tether.domain.tensor import NUMPY_DTYPES
from tether.errors import FormatNotAllowed, InvalidRequest, ModelRejected

LABEL, PROBABILITIES = "label", "probabilities"
PLATFORMS = {
    "digits.onnx": "onnxruntime_onnx",
    "external": "onnxruntime_onnx",
    "digits.pt2": "pytorch_export",
    "digits.pt": "pytorch_libtorch",
    "savedmodel": "tensorflow_savedmodel",
    "digits.tflite": "tensorflow_lite",
    "python": "python",
}
TENSORFLOW = ("savedmodel", "digits.tflite")


@pytest.fixture(scope="module")
def torch_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frameworks.need("torch")
    return frameworks.make(tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture(scope="module")
def tensorflow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frameworks.need("tensorflow", "ai_edge_litert")
    return frameworks.make(tmp_path_factory.mktemp("tensorflow"), "tensorflow")


def serve(served: Served, sdk: Client, name: str, path: Path) -> dict[str, Any]:
    told = sdk.push(name, path)
    with served.client() as http:
        until(lambda: http.get(f"/v2/models/{name}/ready").status_code == 200, f"{name} is ready", 60)
        metadata: dict[str, Any] = http.get(f"/v2/models/{name}").json()
    assert metadata["platform"] == told["platform"]
    return metadata


def direct(folder: Path, name: str) -> dict[str, Any]:
    """What the framework answers without the platform."""
    if name in ("digits.onnx", "external"):
        session = onnxruntime.InferenceSession(frameworks.EXAMPLE / "digits.onnx", providers=["CPUExecutionProvider"])
        return dict(zip((LABEL, PROBABILITIES), session.run(None, {"image": frameworks.images()}), strict=True))
    if name == "python":
        made = runpy.run_path(str(folder / name / "model.py"))["Digits"]()
        made.load(folder / name)
        found: dict[str, Any] = made.predict({"image": frameworks.images()})
        return found
    with np.load(folder / f"answers-{name}.npz", allow_pickle=False) as answers:
        return dict(answers)


@pytest.mark.parametrize("name", PLATFORMS)
def test_every_platform_answers_as_its_framework(
    served: Served, sdk: Client, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = frameworks.EXAMPLE
    if name in ("python", "external"):
        folder = frameworks.make(tmp_path / "made", "python" if name == "python" else "onnx")
    elif name != "digits.onnx":
        folder = request.getfixturevalue("tensorflow_models" if name in TENSORFLOW else "torch_models")
    model = f"digits-{name.replace('.', '-')}"
    metadata = serve(served, sdk, model, folder / name)
    assert metadata["platform"] == PLATFORMS[name]
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]
    assert {spec["name"]: spec["shape"] for spec in metadata["outputs"]} == {LABEL: [-1], PROBABILITIES: [-1, 10]}
    # proven of ONNX, declared by a bundle's description; other frameworks are batched only when the push declares it
    most = 512 if PLATFORMS[name] in ("onnxruntime_onnx", "python") else 0
    assert sdk.model(model)["versions"][0]["max_batch_size"] == most
    found, expected = sdk.infer(model, {"image": frameworks.images()}), direct(folder, name)
    np.testing.assert_array_equal(found[LABEL], expected[LABEL])
    np.testing.assert_allclose(found[PROBABILITIES], expected[PROBABILITIES], rtol=0, atol=1e-6)
    for row in (0, 449):
        alone = sdk.infer(model, {"image": frameworks.images()[row : row + 1]}, outputs=[LABEL])
        assert alone[LABEL].tolist() == [expected[LABEL][row]]


def test_an_exported_program_keeps_its_arguments_and_types(served: Served, sdk: Client, torch_models: Path) -> None:
    metadata = serve(served, sdk, "several", torch_models / "several.pt2")
    names = [spec["name"] for spec in metadata["inputs"]]
    assert [spec["datatype"] for spec in metadata["inputs"]] == ["FP32", "FP32", "BF16"]
    assert [(spec["name"], spec["datatype"], spec["shape"]) for spec in metadata["outputs"]] == [
        ("OUTPUT__0", "FP32", [2, 4]),
        ("OUTPUT__1", "BF16", [3]),
    ]
    brain = NUMPY_DTYPES["BF16"]
    values = [np.full((2, 4), 1.5, np.float32), np.full(3, 2.0, np.float32), np.full(3, 0.5, brain)]
    found = sdk.infer("several", dict(zip(names, values, strict=True)))
    np.testing.assert_array_equal(found["OUTPUT__0"], np.full((2, 4), 3.0, np.float32))
    np.testing.assert_array_equal(found["OUTPUT__1"], np.full(3, 2.5, brain))


def test_strings_go_through_a_saved_model(served: Served, sdk: Client, tensorflow_models: Path) -> None:
    metadata = serve(served, sdk, "shout", tensorflow_models / "shout")
    assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
    found = sdk.infer("shout", {"text": np.array([["ab"], ["\u00e4c"], [""]], dtype=np.object_)})
    assert [bytes(word) for word in found["loud"].flat] == [b"AB", "\u00e4C".encode(), b""]
    assert found["length"].flatten().tolist() == [2, 3, 0]


def test_weights_of_an_onnx_model_may_be_pushed_beside_it(served: Served, sdk: Client, tmp_path: Path) -> None:
    folder = models.split(tmp_path / "split", "parts/weights.bin")
    serve(served, sdk, "split", folder)
    ones = np.ones((2, 256), np.float32)
    np.testing.assert_array_equal(sdk.infer("split", {"x": ones})["y"], np.full((2, 256), 512, np.float32))
    assert {file["path"] for file in sdk.model("split")["versions"][0]["files"]} == {"model.onnx", "parts/weights.bin"}
    with pytest.raises(ModelRejected, match=r"the file 'parts/weights\.bin' \(external data\), which is missing"):
        sdk.push("split", folder / "model.onnx")
    (folder / "notes.txt").write_text("x")
    assert sdk.push("split", folder)["skipped"] == ["notes.txt"]
    (folder / "notes.bin").write_text("x")
    with pytest.raises(ModelRejected, match=r"in the file 'notes\.bin'"):
        sdk.push("split", folder)


def described(folder: Path, source: Path, signature: Any) -> Path:
    folder.mkdir()
    shutil.copy(source, folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(signature))
    return folder


def test_a_torchscript_whose_rows_depend_on_each_other_is_not_batched(
    sdk: Client, torch_models: Path, tmp_path: Path
) -> None:
    sdk.push("mixing", described(tmp_path / "m", torch_models / "mixing.pt", frameworks.MIXING))
    assert sdk.model("mixing")["versions"][0]["max_batch_size"] == 0
    with pytest.raises(InvalidRequest, match=r"mixing\.json or model\.json beside it"):
        sdk.push("mixing", torch_models / "mixing.pt")


def test_a_signature_that_is_not_the_models_is_refused(sdk: Client, torch_models: Path, tmp_path: Path) -> None:
    wrong = {**frameworks.MIXING, "outputs": [{"name": "b", "datatype": "FP64", "shape": [-1, 4]}]}
    with pytest.raises(ModelRejected, match=r"'b' is torch\.float32"):
        sdk.push("wrong", described(tmp_path / "m", torch_models / "mixing.pt", wrong))


def test_a_saved_model_without_a_signature_is_refused(tensorflow_models: Path) -> None:
    refusal = (tensorflow_models / "refusal").read_text()
    assert refusal == (
        "the model has no signature 'serving_default', and not exactly one other; it has: none; save it with signatures"
    )


@pytest.mark.parametrize(
    "name", ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_a_saved_model_with_a_file_that_is_cut_off_is_told(
    sdk: Client, tensorflow_models: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tensorflow_models / "savedmodel", folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    said = "a file of the folder 'variables'" if "data" in name else f"the file '{name}'"
    with pytest.raises(ModelRejected, match=rf"{said} is cut off"):
        sdk.push("cut-off", folder)


def test_the_signature_that_is_named_of_a_saved_model_is_served(
    served: Served, sdk: Client, tensorflow_models: Path
) -> None:
    told = sdk.push("signatures", tensorflow_models / "several", signature="whisper")
    assert (told["signature"], told["signatures"]) == ("whisper", ["shout", "whisper"])
    with served.client() as http:
        until(lambda: http.get("/v2/models/signatures/ready").status_code == 200, "it is ready", 60)
    assert sdk.infer("signatures", {"text": np.array([[b"LOUD"]], np.object_)})["quiet"].tolist() == [[b"loud"]]
    assert sdk.model("signatures")["versions"][0]["signatures"] == ["shout", "whisper"]


def test_the_only_signature_of_a_saved_model_needs_no_name(sdk: Client, tensorflow_models: Path) -> None:
    told = sdk.push("named", tensorflow_models / "named")
    assert (told["signature"], told["signatures"]) == ("shout", ["shout"])


def test_a_saved_model_that_keras_2_saved_with_its_optimizer_is_served(
    served: Served, sdk: Client, tensorflow_models: Path
) -> None:
    serve(served, sdk, "trained", tensorflow_models / "trained")
    assert sdk.infer("trained", {"x": np.array([1.5, -3], np.float32)})["y"].tolist() == [3, -6]


def test_a_format_of_one_signature_takes_no_other(sdk: Client, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(models.add())
    with pytest.raises(InvalidRequest, match="has one signature only"):
        sdk.push("one-signature", path, signature="a")


@pytest.mark.parametrize("name", ["digits.pt2", "digits.pt", *TENSORFLOW])
def test_only_who_may_push_programs_pushes_them(served: Served, name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("tensorflow_models" if name in TENSORFLOW else "torch_models")
    with (
        Client(served.url, served.new_key("models:write", "models:read")) as writer,
        pytest.raises(FormatNotAllowed, match="models:code"),
    ):
        writer.push("untrusted", folder / name)


def hostile(folder: Path, torch_models: Path, kind: str) -> Path:
    """A file that names itself a model of PyTorch, and is none."""
    source = torch_models / "reduce.pt"
    if kind == "torch.save":
        return described(folder, source, frameworks.MIXING)
    folder.mkdir()
    path = folder / ("model.pt2" if kind != "pickle" else "model.pt")
    (folder / "model.json").write_text(json.dumps(frameworks.MIXING))
    if kind == "pickle":
        with zipfile.ZipFile(source) as archive:
            path.write_bytes(archive.read("reduce/data.pkl"))
    elif kind == "sample inputs":
        shutil.copy(torch_models / "reduce.pt2", path)
    else:
        shutil.copy(torch_models / "digits.pt2", path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"digits/data/{kind}", source.read_bytes())
    return path


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("pickle", FormatNotAllowed),
        ("torch.save", FormatNotAllowed),
        ("constants/opaque_obj_0", FormatNotAllowed),
        ("aotinductor/model/model.so", FormatNotAllowed),
        ("sample inputs", ModelRejected),
    ],
)
def test_pickled_objects_are_refused_from_everybody(
    sdk: Client, torch_models: Path, tmp_path: Path, kind: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        sdk.push("pickled", hostile(tmp_path / "m", torch_models, kind))
    assert not (torch_models / "sentinel").exists()
