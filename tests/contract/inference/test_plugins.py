"""What installed packages bring by entry point: the package of ``examples/plugin``, really installed, over HTTP."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.http.served import Served, until
from support.models import frameworks

from tether import Client
from tether.domain.manifest import Batching, Isolation, Manifest, ModelFile, TensorSpec
from tether.errors import FormatNotAllowed, InvalidRequest, ModelRejected
from tether.frameworks import plugins
from tether.modelstore.inspection.formats import format_of
from tether.worker import runtimes
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the package was installed into; it is on the path of services and of their children."""
    place = tmp_path_factory.mktemp("plugin")
    shutil.copytree(frameworks.PLUGIN, place / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(place / "site"), str(place / "source")], check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place / "site"))
        plugins.installed.cache_clear()
        yield place / "site"
    plugins.installed.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frameworks.need("torch", "safetensors")
    return frameworks.make(tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture
def sdk(served: Served, plugin: Path) -> Iterator[Client]:
    del plugin
    with Client(served.url, served.key) as client:
        yield client


def serve(served: Served, sdk: Client, name: str, path: Path) -> dict[str, Any]:
    sdk.push(name, path)
    with served.client() as http:
        until(lambda: http.get(f"/v2/models/{name}/ready").status_code == 200, f"{name} is ready", 60)
        metadata: dict[str, Any] = http.get(f"/v2/models/{name}").json()
    return metadata


def check(sdk: Client, name: str, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]
    assert {spec["name"]: spec["shape"] for spec in metadata["outputs"]} == {"label": [-1], "probabilities": [-1, 10]}
    assert sdk.model(name)["versions"][0]["max_batch_size"] == 0
    found = sdk.infer(name, {"image": frameworks.images()})
    np.testing.assert_array_equal(found["label"], expected["label"])
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=0, atol=1e-6)
    alone = sdk.infer(name, {"image": frameworks.images()[5:6]}, outputs=["label"])
    assert alone["label"].tolist() == [expected["label"][5]]


def test_weights_of_an_installed_architecture_answer_as_pytorch(served: Served, sdk: Client, weights: Path) -> None:
    metadata = serve(served, sdk, "digits-safetensors", weights / "safetensors")
    assert metadata["platform"] == "pytorch_safetensors"
    with np.load(weights / "answers-safetensors.npz", allow_pickle=False) as answers:
        check(sdk, "digits-safetensors", metadata, dict(answers))


def test_weights_are_data_so_whoever_pushes_models_may_push_them(
    served: Served, plugin: Path, weights: Path, tmp_path: Path
) -> None:
    del plugin
    alone = tmp_path / "digits.safetensors"  # a file, and its description under the same name
    shutil.copy(weights / "safetensors" / "model.safetensors", alone)
    shutil.copy(weights / "safetensors" / "model.json", alone.with_suffix(".json"))
    with Client(served.url, served.new_key("models:write", "models:read")) as writer:
        assert writer.push("digits-data", alone)["platform"] == "pytorch_safetensors"
        with pytest.raises(InvalidRequest, match="only ONNX runs in a thread of the worker"):
            writer.push("digits-data", alone, isolation="thread")


DRAWS = """
import torch
from tether.frameworks import pytorch as torch_model

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Conv2d(3, 4, 3), torch.nn.LSTM(4, 4))
        self.register_buffer("table", torch.nn.init.uniform_(torch.empty(1000), 1.0, 2.0), persistent=False)

def state(build):
    torch.manual_seed(5)
    module = build()
    return module, torch.random.get_rng_state()

_, drawn = state(Module)
with torch_model._weights_left_empty():
    module, left = state(Module)
_, only_table = state(lambda: torch.nn.init.uniform_(torch.empty(1000), 1.0, 2.0))
assert 1.0 <= module.table.min() < module.table.max() <= 2.0
assert torch.equal(left, only_table) and not torch.equal(left, drawn)
_, again = state(Module)
assert torch.equal(again, drawn)
"""


def test_no_numbers_are_drawn_for_weights_that_are_read_and_all_are_for_the_rest() -> None:
    frameworks.need("torch", "safetensors")
    subprocess.run([sys.executable, "-c", DRAWS], check=True, timeout=60)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "resnet-9000"}, r"unknown architecture 'resnet-9000' \(known: 'digits-mlp'\); install"),
    ({"config": {"hidden": 1 << 40}}, r"config\.hidden must be 1 to 4096"),
    ({"config": {"hidden": 3}}, "weights are not those of 'digits-mlp': .*size mismatch"),
    ({"other": 1}, r"model\.json is invalid: .*unknown field `other`"),
    ({"outputs": [{"name": "gone", "datatype": "FP32", "shape": [-1]}]}, "returned no output 'gone'"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_a_description_that_does_not_fit_the_weights_is_refused(
    sdk: Client, weights: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(weights / "safetensors", tmp_path / "m")
    described = json.loads((folder / "model.json").read_bytes())
    (folder / "model.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(ModelRejected, match=words):
        sdk.push("unfit", folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x80\x04N."], ids=["empty", "endless header", "pickle"])
def test_what_is_no_safetensors_is_refused(sdk: Client, weights: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(weights / "safetensors", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelRejected if content else (ModelRejected, InvalidRequest)):
        sdk.push("no-weights", folder)


def test_a_runtime_of_another_package_serves_its_platform(served: Served, sdk: Client, tmp_path: Path) -> None:
    folder = frameworks.make(tmp_path / "made", "npz") / "npz"
    metadata = serve(served, sdk, "digits-npz", folder)
    assert metadata["platform"] == "numpy_npz"
    runtime = importlib.import_module("tether_digits_npz").load(folder)
    expected = dict(zip(runtime.output_names, runtime.run({"image": frameworks.images()}, ()), strict=True))
    check(sdk, "digits-npz", metadata, expected)
    (folder / "weights.npz").write_bytes(b"none")
    with pytest.raises(ModelRejected, match=r"a file weights\.npz with w1"):
        sdk.push("digits-npz", folder)
    with (
        Client(served.url, served.new_key("models:write", "models:read")) as writer,
        pytest.raises(FormatNotAllowed, match="models:code"),
    ):
        writer.push("digits-npz", folder)


def manifest(platform: str) -> Manifest:
    file = ModelFile("model.json", 1, "0" * 64, ("0" * 64,), (1,))
    outputs = (TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 10)))
    return Manifest("m", 1, platform, (file,), (), outputs, Batching(8), 0.0, "test", isolation=Isolation.THREAD)


def test_code_of_other_packages_is_never_loaded_into_the_worker(plugin: Path, tmp_path: Path) -> None:
    del plugin
    folder = frameworks.make(tmp_path / "made", "npz") / "npz"
    sys.modules.pop("tether_digits_npz", None)
    made = runtimes.load(manifest("numpy_npz"), folder, Options())
    assert isinstance(made, ProcessRuntime)
    assert made.run({"image": frameworks.images()[:2]}, ("label",))[0].shape == (2,)
    made.close()
    assert "tether_digits_npz" not in sys.modules


def test_a_platform_that_nobody_brings_is_refused_by_name(plugin: Path) -> None:
    del plugin
    assert format_of("numpy_npz").code
    with pytest.raises(InvalidRequest, match=r"unknown platform 'caffe'; expected one of .*'python'.*'numpy_npz'"):
        format_of("caffe")
    with pytest.raises(ModelRejected, match="unknown runtime 'caffe'"):
        plugins.load(plugins.RUNTIMES, "caffe", "runtime", "platform")


def test_a_package_that_cannot_be_imported_says_so_and_of_two_of_a_name_none_counts(tmp_path: Path) -> None:
    for number, target in enumerate(("tether_absent_module", "tether_absent_module", "json:absent")):
        folder = tmp_path / f"made_{number}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made_{number}\nVersion: 1\n")
        name = "twice" if number < 2 else "once"
        (folder / "entry_points.txt").write_text(f"[tether.runtimes]\n{name} = {target}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        plugins.installed.cache_clear()
        with pytest.raises(ModelRejected, match=r"'once' cannot be imported from 'json:absent'"):
            plugins.load(plugins.RUNTIMES, "once", "runtime", "platform")
        with pytest.raises(ModelRejected, match="unknown runtime 'twice'"):
            plugins.load(plugins.RUNTIMES, "twice", "runtime", "platform")
    plugins.installed.cache_clear()
