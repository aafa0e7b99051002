"""Models of PyTorch and TensorFlow for tests, and what the frameworks themselves answer.

Called as ``python tests/support/models/frameworks.py FOLDER torch`` or ``... tensorflow``, because nobody wants a framework in the process of the
tests: it writes models of that framework into FOLDER, and ``answers-NAME.npz`` of each digits model on the held-out images.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.errors import ModelRejected

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "digits"
PLUGIN = ROOT / "examples" / "plugin"
MIXING = {
    "inputs": [{"name": "a", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "b", "datatype": "FP32", "shape": [-1, 4]}],
}


def need(*frameworks: str) -> None:
    """Skip the test where a framework is not installed, except in CI."""
    for name in frameworks:
        if importlib.util.find_spec(name) is None:
            reason = f"needs {name}: pip install -e '.[all,dev]'"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason, allow_module_level=True)


def make(folder: Path, framework: str) -> Path:
    """The folder, with the models of one framework in it."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{EXAMPLE}:{PLUGIN}:{ROOT}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), framework]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def images() -> Any:
    with np.load(EXAMPLE / "digits_holdout.npz", allow_pickle=False) as holdout:
        return holdout["images"]


def write_torch(folder: Path) -> None:
    import torch  # noqa: PLC0415 - only the child

    torch.set_num_threads(1)
    loaded: dict[str, Any] = {
        "digits.pt2": torch.export.load(folder / "digits.pt2").module(),
        "digits.pt": torch.jit.load(folder / "digits.pt"),
    }
    for name, model in loaded.items():
        with torch.inference_mode():
            found = model(torch.from_numpy(images()))
        np.savez(folder / f"answers-{name}.npz", **{key: value.numpy() for key, value in found.items()})
    _answer_weights(folder)

    class Several(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def forward(self, x: Any, *, pair: tuple[Any, Any]) -> tuple[Any, Any]:
            return x * 2, (pair[0] + pair[1]).to(torch.bfloat16)

    given: Any = ((torch.zeros(2, 4),), {"pair": (torch.ones(3), torch.ones(3, dtype=torch.bfloat16))})
    torch.export.save(torch.export.export(Several(), given[0], given[1]), folder / "several.pt2")

    class Mixing(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def forward(self, a: Any) -> Any:
            return a - a.mean(0)

    torch.jit.trace(Mixing(), torch.zeros(2, 4)).save(folder / "mixing.pt")
    _write_hostile(folder)


def _answer_weights(folder: Path) -> None:
    """What the module of ``examples/plugin`` answers with the weights of ``safetensors``."""
    import tether_digits_torch  # noqa: PLC0415 - only the child
    import torch  # noqa: PLC0415 - likewise
    from safetensors.torch import load_file  # noqa: PLC0415 - likewise

    weights = load_file(folder / "safetensors" / "model.safetensors")
    module = tether_digits_torch.build({"hidden": len(weights["first.bias"])})
    module.load_state_dict(weights)
    with torch.inference_mode():
        found = module.eval()(torch.from_numpy(images()))
    np.savez(folder / "answers-safetensors.npz", **{key: value.numpy() for key, value in found.items()})


class Touch:
    """Creates a file wherever somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def _write_hostile(folder: Path) -> None:
    """``reduce.pt`` as torch.save writes it, and ``reduce.pt2`` that has it for its sample inputs; both want ``sentinel``."""
    import torch  # noqa: PLC0415 - only the child

    sentinel = folder / "sentinel"
    torch.save(Touch(sentinel), folder / "reduce.pt")
    with zipfile.ZipFile(folder / "reduce.pt") as archive:
        load = "import pickle, sys; pickle.load(sys.stdin.buffer)"
        subprocess.run([sys.executable, "-c", load], input=archive.read("reduce/data.pkl"), check=True)
    assert sentinel.exists()  # without this one that never appears would prove nothing
    sentinel.unlink()
    with zipfile.ZipFile(folder / "digits.pt2") as good, zipfile.ZipFile(folder / "reduce.pt2", "w") as bad:
        for name in good.namelist():
            own = name.endswith("sample_inputs/model.pt")
            bad.writestr(name, (folder / "reduce.pt").read_bytes() if own else good.read(name))


def write_tensorflow(folder: Path) -> None:
    import tensorflow as tf  # noqa: PLC0415 - only the child

    from tether.frameworks import tensorflow  # noqa: PLC0415 - likewise

    served = tf.saved_model.load(str(folder / "savedmodel")).signatures["serving_default"]
    found = served(image=tf.constant(images()))
    np.savez(folder / "answers-savedmodel.npz", **{key: value.numpy() for key, value in found.items()})
    _answer_lite(folder)

    def shout(text: Any) -> dict[str, Any]:
        return {"loud": tf.strings.upper(text), "length": tf.strings.length(text)}

    signature = [tf.TensorSpec([None, 1], tf.string, name="text")]
    module = tf.Module()
    tf.saved_model.save(module, str(folder / "shout"), signatures=tf.function(shout, input_signature=signature))
    tf.saved_model.save(module, str(folder / "unsigned"))
    shouting = tf.function(shout, input_signature=signature)
    whispering = tf.function(lambda text: {"quiet": tf.strings.lower(text)}, input_signature=signature)
    tf.saved_model.save(module, str(folder / "named"), signatures={"shout": shouting})
    tf.saved_model.save(module, str(folder / "several"), signatures={"shout": shouting, "whisper": whispering})
    _write_trained(folder / "trained")
    try:
        tensorflow.SavedModel(folder / "unsigned", "")
    except ModelRejected as error:
        (folder / "refusal").write_text(error.message)


def _write_trained(folder: Path) -> None:
    """A model with the state of its optimizer, as Keras 2 saved them: ``y = 2 x``."""
    import tensorflow as tf  # noqa: PLC0415 - only the child
    from tensorflow.core.protobuf import saved_model_pb2  # noqa: PLC0415 - likewise
    from tensorflow.python.keras.optimizer_v2 import adam  # noqa: PLC0415 - likewise

    module = tf.Module()
    module.factor = tf.Variable(2.0)
    module.optimizer = adam.Adam(0.0)
    module.optimizer.apply_gradients([(tf.constant(1.0), module.factor)])
    function = tf.function(lambda x: {"y": x * module.factor}, input_signature=[tf.TensorSpec([None], name="x")])
    tf.saved_model.save(module, str(folder), signatures=function)
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    (optimizer,) = [node for node in saved.meta_graphs[0].object_graph_def.nodes if node.slot_variables]
    optimizer.user_object.identifier = "optimizer"  # so did Keras 2; the copy in TensorFlow has another one
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())


def _answer_lite(folder: Path) -> None:
    """What LiteRT itself answers."""
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - only the child

    interpreter = Interpreter(model_path=str(folder / "digits.tflite"))
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], images().shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], images())
    interpreter.invoke()
    found = [interpreter.get_tensor(one["index"]) for one in interpreter.get_output_details()]
    named = {"label" if array.ndim == 1 else "probabilities": array for array in found}
    np.savez(folder / "answers-digits.tflite.npz", **named)


def main() -> None:
    import other_frameworks  # noqa: PLC0415 - only the child

    folder, framework = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(exist_ok=True)
    other_frameworks.WRITERS[framework](folder, other_frameworks.weights())
    if framework in (checks := {"torch": write_torch, "tensorflow": write_tensorflow}):
        checks[framework](folder)


if __name__ == "__main__":
    main()
