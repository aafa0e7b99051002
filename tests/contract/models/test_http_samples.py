"""Pushes over HTTP, SDK and command line: with real inputs, of what made-up inputs do not suit, and what can be asked then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import helper
from support.http.served import Served, until
from support.models import bundles, graphs
from typer.testing import CliRunner

from tether import Client
from tether.client.pushing.local_model import local_model
from tether.errors import BadTensor, InferenceFailed, ModelRejected
from tether_cli.main import application


@pytest.fixture
def http(served: Served) -> Any:
    with served.client() as client:
        yield client


def ready(served: Served, name: str) -> None:
    with served.client() as http:
        until(lambda: http.get(f"/v2/models/{name}/ready").status_code == 200, f"{name} is ready")


X = np.arange(14, dtype=np.float32).reshape(2, 7)
SHAPE = np.array([7, 2])


def reshaping(folder: Path) -> Path:
    """A graph that takes no made-up shape."""
    path = folder / "reshape.onnx"
    inputs = [("x", "FP32", ("n", 7)), ("shape", "INT64", (2,))]
    path.write_bytes(graphs.build([graphs.node("Reshape", "x shape")], inputs, [("y", "FP32", ("a", "b"))]))
    return path


def test_a_model_that_takes_no_made_up_inputs_is_served_and_said_to_be_untried(
    served: Served, sdk: Client, http: httpx.Client, tmp_path: Path
) -> None:
    told = sdk.push("untried", reshaping(tmp_path))
    assert "Reshape" in told["untried"]
    assert told["batching"]["max_batch_size"] == 0
    assert http.get("/v1/models/untried").json()["versions"][0]["untried"] == told["untried"]
    (listed,) = [one for one in sdk.models() if one["name"] == "untried"]
    assert listed["untried"] == told["untried"]
    ready(served, "untried")
    found = sdk.infer("untried", {"x": X, "shape": SHAPE})["y"]
    assert found.shape == (7, 2)


@pytest.mark.parametrize("form", ["arrays", "lists", "npz", "json"])
def test_a_sample_tries_it_is_kept_with_the_version_and_makes_another_one(
    served: Served, sdk: Client, tmp_path: Path, form: str
) -> None:
    path, name = reshaping(tmp_path), f"sampled-{form}"
    given: Any = {"x": X, "shape": SHAPE}
    if form == "lists":
        given = {"x": X.tolist(), "shape": SHAPE.tolist()}
    elif form == "npz":
        np.savez(tmp_path / "s.npz", x=X.astype(np.float64), shape=SHAPE)
        given = tmp_path / "s.npz"
    elif form == "json":
        given = tmp_path / "s.json"
        given.write_text(json.dumps({"x": X.tolist(), "shape": [7, 2]}))
    assert sdk.push(name, path)["version"] == 1
    told = sdk.push(name, path, sample=given)
    assert (told["version"], told["untried"]) == (2, "")
    assert sdk.push(name, path, sample=given)["version"] == 2
    ready(served, name)
    assert sdk.infer(name, {"x": X, "shape": SHAPE})["y"].shape == (7, 2)
    sdk.pull(name, tmp_path / "pulled")
    assert [file.path for file in local_model(tmp_path / "pulled").files] == ["model.onnx", "tether-sample.json"]
    assert sdk.push(name, tmp_path / "pulled")["version"] == 2


def test_a_sample_comes_along_to_an_encrypted_model_too(served: Served, sdk: Client, tmp_path: Path) -> None:
    told = sdk.push("sampled-sealed", reshaping(tmp_path), sample={"x": X, "shape": SHAPE}, encrypt=True)
    assert (told["encrypted"], told["untried"]) == (True, "")
    ready(served, "sampled-sealed")


def test_a_sample_that_the_model_does_not_take_is_refused(sdk: Client, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="the model fails on the sample"):
        sdk.push("unfit-sample", reshaping(tmp_path), sample={"x": X, "shape": np.array([5, 2])})
    with pytest.raises(TypeError, match="no argument 'samples'"):
        sdk.push("unfit-sample", reshaping(tmp_path), samples=1)  # type: ignore[call-arg]


def test_the_command_line_says_what_was_not_tried_and_takes_a_sample(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TETHER_URL", served.url)
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    folder = tmp_path / "m"
    folder.mkdir()
    reshaping(folder)
    (folder / ".gitattributes").touch()
    (folder / "README.md").write_text("about")
    told = CliRunner().invoke(application(), ["model", "push", "told", str(folder)])
    assert told.exit_code == 0, told.output
    assert "not tried: the trial run with made-up inputs failed" in told.output
    assert "not sent, because not part of the model: .gitattributes, README.md" in told.output
    np.savez(tmp_path / "s.npz", x=X, shape=SHAPE)
    told = CliRunner().invoke(
        application(), ["model", "push", "told", str(folder), "--sample", str(tmp_path / "s.npz")]
    )
    assert told.exit_code == 0, told.output
    assert "not tried" not in told.output


def test_one_body_brings_a_sample_before_the_model_file(http: httpx.Client, tmp_path: Path) -> None:
    model = reshaping(tmp_path).read_bytes()
    given = json.dumps({"x": X.tolist(), "shape": SHAPE.tolist()}).encode()
    path, length = "/v1/models/one-body/versions", {"x-tether-sample-length": str(len(given))}
    digest = {"x-tether-sha256": hashlib.sha256(model).hexdigest()}
    told = http.post(path, content=given + model, headers={**length, **digest})
    assert (told.status_code, told.json()["untried"]) == (201, ""), told.text
    files = http.get("/v1/models/one-body/versions/1/files").json()["files"]
    assert [(file["path"], file["size"]) for file in files] == [
        ("model.onnx", len(model)),
        ("tether-sample.json", len(given)),
    ]
    again = http.post(path, content=(part for part in (given[:5], given[5:] + model[:9], model[9:])), headers=length)
    assert (again.status_code, again.json()["version"]) == (200, 1), again.text


@pytest.mark.parametrize(
    ("length", "content", "status", "words"),
    [
        ("x", b"", 400, "must be a number of bytes above 0"),
        ("0", b"", 400, "must be a number of bytes above 0"),
        ("67108865", b"", 413, "a sample must have at most 67108864 bytes"),
        ("9" * 5000, b"", 413, "a sample must have at most"),
        ("1000", b'{"x": [1]}', 400, "the body ends within the sample"),
        ("10", b'{"x": [1]}', 400, "send the bytes of the model file"),
        ("10", b'{"x": 5]}}MODEL', 422, "the sample is not a JSON object"),
        ("12", b'{"z": [1.5]}MODEL', 422, "the sample does not match the model"),
    ],
)
def test_a_sample_before_the_model_file_that_is_wrong_is_told(
    http: httpx.Client, tmp_path: Path, *, length: str, content: bytes, status: int, words: str
) -> None:
    content = content.replace(b"MODEL", reshaping(tmp_path).read_bytes())
    told = http.post("/v1/models/one-body-wrong/versions", content=content, headers={"x-tether-sample-length": length})
    assert told.status_code == status, told.text
    assert words in told.json()["error"]


def test_a_python_model_may_write_into_its_inputs_at_the_push_and_in_serving(
    served: Served, sdk: Client, tmp_path: Path
) -> None:
    code = (
        "class Model:\n    def predict(self, inputs):\n        x = inputs['x']\n        x += 1\n        "
        "return {'y': x}\n"
    )
    assert sdk.push("in-place", bundles.write(tmp_path / "m", code=code))["untried"] == ""
    ready(served, "in-place")
    for _ in range(2):
        np.testing.assert_array_equal(
            sdk.infer("in-place", {"x": np.ones((2, 4), np.float32)})["y"], np.full((2, 4), 2)
        )


def test_a_bundle_with_empty_and_oddly_named_files_is_served(served: Served, sdk: Client, tmp_path: Path) -> None:
    code = (
        "import pkg, pathlib\nclass Model:\n    def load(self, folder):\n"
        "        self.add = float((folder / 'my weights (1) ß.txt').read_text())\n"
        "    def predict(self, inputs):\n        return {'y': inputs['x'] + self.add}\n"
    )
    folder = bundles.write(tmp_path / "m", code=code)
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").touch()
    (folder / "my weights (1) ß.txt").write_text("2")
    sdk.push("odd-files", folder)
    ready(served, "odd-files")
    assert sdk.infer("odd-files", {"x": np.ones((1, 4), np.float32)})["y"][0, 0] == 3
    told = sdk.pull("odd-files", tmp_path / "pulled")
    assert "pkg/__init__.py" in told["files"]
    assert (tmp_path / "pulled" / "pkg" / "__init__.py").read_bytes() == b""


def test_an_empty_model_file_is_told_as_that_whoever_sends_it(http: httpx.Client) -> None:
    empty = {"path": "model.onnx", "size": 0, "digest": "", "chunks": [], "sizes": []}
    answer = http.post("/v1/models/empty/versions:register", json={"files": [empty]})
    assert answer.status_code == 422
    assert "'model.onnx' is empty: it has 0 bytes" in answer.json()["error"]


def test_optional_inputs_may_be_given_and_such_jobs_run_by_themselves(
    served: Served, sdk: Client, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        graphs.build(
            [graphs.node("Mul", "x w")],
            [graphs.X, ("w", "FP32", (1,))],
            [("y", "FP32", ("n", 4))],
            {"w": np.array([2.0])},
        )
    )
    told = sdk.push("optional", path)
    assert told["batching"]["max_batch_size"] > 1
    assert [spec.get("optional", False) for spec in told["inputs"]] == [False, True]
    ready(served, "optional")
    ones = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(sdk.infer("optional", {"x": ones})["y"], ones * 2)
    np.testing.assert_array_equal(sdk.infer("optional", {"x": ones, "w": np.array([5], "f4")})["y"], ones * 5)
    rows = told["batching"]["max_batch_size"] + 1
    many = np.ones((rows, 4), np.float32)
    np.testing.assert_array_equal(sdk.infer("optional", {"x": many, "w": np.array([3], "f4")})["y"], many * 3)
    handles = [
        sdk.submit("optional", {"x": ones, **({} if n % 2 else {"w": np.array([n], "f4")})}) for n in range(1, 9)
    ]
    for number, handle in enumerate(handles, 1):
        expected = ones * (2 if number % 2 else number)
        np.testing.assert_array_equal(handle.result(20)["y"], expected)


def test_lengths_that_do_not_agree_are_400_and_values_that_the_model_cannot_take_422(
    served: Served, sdk: Client, http: httpx.Client
) -> None:
    shared = graphs.build(
        [graphs.node("Mul", "x mask")],
        [("x", "FP32", ("n", "seq")), ("mask", "FP32", ("n", "seq"))],
        [("y", "FP32", ("n", "seq"))],
    )
    served.push("shared-axis", shared)
    with pytest.raises(BadTensor, match=r"input 'mask' has 2 on axis 1 \('seq'\), but input 'x' has 3"):
        sdk.infer("shared-axis", {"x": np.ones((1, 3), np.float32), "mask": np.ones((1, 2), np.float32)})
    served.push(
        "values",
        graphs.build(
            [graphs.node("Gather", "w x")], [("x", "INT64", ("n",))], [("y", "FP32", ("n",))], {"w": np.ones(3)}
        ),
    )
    body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [99]}]}
    answer = http.post("/v2/models/values/infer", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "inference_failed")
    assert "onnxruntime::" not in answer.text
    with pytest.raises(InferenceFailed, match="out of"):
        sdk.infer("values", {"x": np.array([99])})


def test_a_model_without_inputs_is_asked_over_http_sdk_and_command_line(
    served: Served, sdk: Client, http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.push(
        "no-inputs",
        graphs.build([graphs.constant("c", [1, 2, 3]), graphs.node("Identity", "c")], [], [("y", "INT64", (3,))]),
    )
    assert http.post("/v2/models/no-inputs/infer", json={"inputs": []}).json()["outputs"][0]["data"] == [1, 2, 3]
    np.testing.assert_array_equal(sdk.infer("no-inputs", {})["y"], [1, 2, 3])
    np.testing.assert_array_equal(sdk.submit("no-inputs", {}).result(20)["y"], [1, 2, 3])
    monkeypatch.setenv("TETHER_URL", served.url)
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    for content in ("{}", '{"inputs": []}'):
        for command in (["infer", "no-inputs"], ["submit", "--wait", "no-inputs"]):
            told = CliRunner().invoke(application(), [*command, "-"], input=content)
            assert told.exit_code == 0, told.output
            assert "[1, 2, 3]" in told.output


@pytest.mark.parametrize("name", ["x\ny", "x" * 1025, "x\u200by"])
def test_a_name_that_no_request_could_say_is_refused_at_the_push(sdk: Client, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    node = helper.make_node("Neg", [name], ["y"])
    path.write_bytes(graphs.build([node], [(name, "FP32", ("n", 4))], [("y", "FP32", ("n", 4))]))
    with pytest.raises(ModelRejected, match=r"the name of input '.*' has .*rename it"):
        sdk.push("unnameable", path)


@pytest.mark.parametrize("name", ["x" * 1024, "a/b:0", "größe 🙂"])
def test_any_other_name_can_be_asked_for(served: Served, sdk: Client, name: str) -> None:
    node = helper.make_node("Neg", [name], ["y"])
    served.push("nameable", graphs.build([node], [(name, "FP32", ("n", 4))], [("y", "FP32", ("n", 4))]))
    np.testing.assert_array_equal(sdk.infer("nameable", {name: np.ones((1, 4), np.float32)})["y"], -np.ones((1, 4)))
