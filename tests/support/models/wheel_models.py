"""Real models that come in wheels of the Python Package Index, what they are asked, and what their own runtime answers.

Called as ``python tests/support/models/wheel_models.py MODEL REQUESTS ANSWERS`` it runs TensorFlow, PyTorch or LiteRT, because nobody wants a
framework in the process of the tests: REQUESTS and ANSWERS are folders of ``.npz`` files, one for each request, asked in order.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

Asked = dict[str, Any]
Draw = Callable[[np.random.Generator, int], Asked]
"""The inputs of one request with so many rows."""

CACHE = Path(os.environ.get("TETHER_TEST_WHEELS_CACHE", Path.home() / ".cache" / "tether-test-wheels"))
WHEELS = {
    "basic-pitch==0.4.0": "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
    "magika==1.0.3": "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    "mediapipe==0.10.21": "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    "nudenet==3.4.2": "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331",
    "rapidocr-onnxruntime==1.4.4": "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "silero-vad==6.2.3": "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
}
"""Each with the digest of its wheel for Linux on x86-64 and Python 3.11, which is fetched on every machine: only models are read."""
PLATFORM = (
    "--platform",
    "manylinux_2_28_x86_64",
    "--python-version",
    "3.11",
    "--implementation",
    "cp",
    "--abi",
    "cp311",
)
FETCH_TIMEOUT_S = 300


class WheelModel(NamedTuple):
    """A model in a wheel. ``signature`` is what has to be written down for TorchScript; ``operator`` is one that its runtime lacks."""

    wheel: str
    path: str
    draw: Draw
    rows: tuple[int, ...] = (1, 2, 3)
    signature: dict[str, Any] = {}  # noqa: RUF012 - nothing writes into it
    lacking: str = ""

    @property
    def name(self) -> str:
        """Of the model when it is pushed, and of its test."""
        stem = "-".join(Path(self.path).name.split("."))
        return f"{self.wheel.partition('==')[0]}-{stem}".lower()


def fetched(wheel: str) -> Path:
    """The folder with the wheel's files. Where it cannot be had the test is skipped, and fails in CI."""
    folder = CACHE / WHEELS[wheel]
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as made:
        if said := _download(wheel, Path(made)):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{wheel} could not be fetched: {said[-500:]}")
        (archive,) = Path(made).glob("*.whl")
        content = Path(made) / "content"
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                file.extract(name, content)
        try:
            content.rename(folder)
        except OSError:  # another process of the tests was first
            assert folder.is_dir()
    return folder


def _download(wheel: str, into: Path) -> str:
    """What pip said against it; empty when it is there."""
    wanted = into / "wanted.txt"
    wanted.write_text(f"{wheel} --hash=sha256:{WHEELS[wheel]}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
    ]
    command += [*PLATFORM, "--dest", str(into), "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {FETCH_TIMEOUT_S} s"
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""


def image(name: str, *shape: int) -> Draw:
    """Numbers of 0 to 1: pixels, with the rows before."""
    return lambda random, rows: {name: random.random((rows, *shape), np.float32)}


def picture(name: str, *sizes: tuple[int, int]) -> Draw:
    """An image of three planes whose height and width are one of those."""

    def draw(random: np.random.Generator, rows: int) -> Asked:
        height, width = sizes[rows % len(sizes)]
        return {name: random.random((rows, 3, height, width), np.float32) * 2 - 1}

    return draw


def sound(name: str, *shape: int) -> Draw:
    """A wave between -1 and 1 with noise."""

    def draw(random: np.random.Generator, rows: int) -> Asked:
        time = np.arange(shape[0])
        waves = np.stack([np.sin(time * random.uniform(0.01, 0.3)) for _ in range(rows)]) * 0.7
        noisy = (waves + random.normal(0, 0.05, waves.shape)).astype(np.float32)
        return {name: noisy.reshape(rows, *shape)}

    return draw


def speech(samples: int, rate: int | None = 16000, *, dtype: type = np.float32) -> Draw:
    """A chunk of a recording for silero, and the state that the chunk before left."""

    def draw(random: np.random.Generator, rows: int) -> Asked:
        state = random.normal(0, 0.5, (2, rows, 128)).astype(np.float32)
        rated = {} if rate is None else {"sr": np.array(rate, np.int64)}
        return {**sound("input", samples)(random, rows), "state": state, **rated}

    return draw


def speech_chunks(random: np.random.Generator, rows: int) -> Asked:
    """Chunks one after another, with the state of an LSTM."""
    h, c = random.normal(0, 0.5, (2, 1, 1, 128)).astype(np.float32)
    return {**sound("input", 576)(random, rows), "h": h, "c": c}


def scripted_speech(random: np.random.Generator, rows: int) -> Asked:
    """The script keeps its state itself, and forgets it when the number of rows is another one than before."""
    return {**sound("x", 512)(random, rows), "sr": np.array(16000, np.int64)}


def file_bytes(random: np.random.Generator, rows: int) -> Asked:
    """First and last bytes of files; 256 is none."""
    found = random.integers(0, 256, (rows, 2048), np.int32)
    found[:, 700:1024] = 256
    return {"bytes": found}


SPOKEN = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 512]},
        {"name": "sr", "datatype": "INT64", "shape": []},
    ],
    "outputs": [{"name": "speech", "datatype": "FP32", "shape": [-1, 1]}],
}


def _mediapipe(path: str, name: str, *shape: int, lacking: str = "") -> WheelModel:
    return WheelModel(
        "mediapipe==0.10.21", f"mediapipe/modules/{path}.tflite", image(name, *shape), (1, 1), {}, lacking
    )


PITCH = "basic_pitch/saved_models/icassp_2022/nmp"
SILERO = "silero_vad/data/silero_vad"
RAPID = "rapidocr_onnxruntime/models/ch_"
MODELS = (
    WheelModel("basic-pitch==0.4.0", f"{PITCH}.onnx", sound("serving_default_input_2:0", 43844, 1)),
    WheelModel("basic-pitch==0.4.0", f"{PITCH}.tflite", sound("input_2", 43844, 1)),
    WheelModel("basic-pitch==0.4.0", PITCH, sound("input_2", 43844, 1)),
    WheelModel("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", file_bytes),
    WheelModel("nudenet==3.4.2", "nudenet/320n.onnx", picture("images", (320, 320), (320, 256))),
    WheelModel("rapidocr-onnxruntime==1.4.4", f"{RAPID}PP-OCRv4_det_infer.onnx", picture("x", (320, 320), (96, 256))),
    WheelModel("rapidocr-onnxruntime==1.4.4", f"{RAPID}PP-OCRv4_rec_infer.onnx", picture("x", (48, 320), (48, 160))),
    WheelModel("rapidocr-onnxruntime==1.4.4", f"{RAPID}ppocr_mobile_v2.0_cls_infer.onnx", picture("x", (48, 192))),
    WheelModel("silero-vad==6.2.3", f"{SILERO}.onnx", speech(576)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}_16k_op15.onnx", speech(576)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}_16k_sequence.onnx", speech_chunks, (1, 7, 20)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}_half.onnx", speech(576, None)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}_op18_ifless.onnx", speech(288, 8000)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}_openvino_16k.onnx", speech(576, None), (1, 1)),
    WheelModel("silero-vad==6.2.3", f"{SILERO}.jit", scripted_speech, (5, 2, 1, 3), SPOKEN),
    _mediapipe("face_detection/face_detection_full_range_sparse", "input_1", 192, 192, 3),
    _mediapipe("face_detection/face_detection_short_range", "input", 128, 128, 3),
    _mediapipe("face_landmark/face_landmark", "input_1", 192, 192, 3),
    _mediapipe(
        "face_landmark/face_landmark_with_attention", "input_1", 192, 192, 3, lacking="Landmarks2TransformMatrix"
    ),
    _mediapipe("hand_landmark/hand_landmark_full", "input_1", 224, 224, 3),
    _mediapipe("hand_landmark/hand_landmark_lite", "input_1", 224, 224, 3),
    _mediapipe("holistic_landmark/hand_recrop", "input_1", 256, 256, 3),
    _mediapipe("iris_landmark/iris_landmark", "input_1", 64, 64, 3),
    _mediapipe("palm_detection/palm_detection_full", "input_1", 192, 192, 3),
    _mediapipe("palm_detection/palm_detection_lite", "input_1", 192, 192, 3),
    _mediapipe("pose_detection/pose_detection", "input_1", 224, 224, 3),
    _mediapipe("pose_landmark/pose_landmark_full", "input_1", 256, 256, 3),
    _mediapipe("selfie_segmentation/selfie_segmentation", "input_1", 256, 256, 3),
    _mediapipe("selfie_segmentation/selfie_segmentation_landscape", "input_1", 144, 256, 3),
)


def native(path: Path, asked: Sequence[Asked], folder: Path) -> list[list[Any]]:
    """What the model's own runtime answers to requests that come in this order: each answer is by the order of outputs, or by the
    sorted names of them where the runtime has no order."""
    if path.suffix == ".onnx":
        return _onnx(path, asked)
    requests, answers = folder / "requests", folder / "answers"
    for made in (requests, answers):
        made.mkdir()
    for number, one in enumerate(asked):
        np.savez(requests / f"{number:03}.npz", **one)
    environment = {"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, str(path), str(requests), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for file in sorted(answers.iterdir()):
        with np.load(file, allow_pickle=False) as arrays:
            found.append([arrays[name] for name in arrays.files])
    return found


def _onnx(path: Path, asked: Sequence[Asked]) -> list[list[Any]]:
    import onnxruntime  # noqa: PLC0415 - only who asks

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, one) for one in asked]


def _lite(path: Path) -> Callable[[Asked], list[Any]]:
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - only the child

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    if signatures := interpreter.get_signature_list():
        (name,) = signatures
        runner = interpreter.get_signature_runner(name)
        return lambda asked: [array for _, array in sorted(runner(**asked).items())]
    places = {one["name"]: one["index"] for one in interpreter.get_input_details()}

    def answer(asked: Asked) -> list[Any]:
        for name, array in asked.items():
            interpreter.resize_tensor_input(places[name], array.shape)
        interpreter.allocate_tensors()
        for name, array in asked.items():
            interpreter.set_tensor(places[name], array)
        interpreter.invoke()
        outputs = sorted(interpreter.get_output_details(), key=lambda one: one["name"])
        return [interpreter.get_tensor(one["index"]) for one in outputs]

    return answer


def _script(path: Path) -> Callable[[Asked], list[Any]]:
    import torch  # noqa: PLC0415 - only the child

    torch.set_num_threads(1)
    module = torch.jit.load(path).eval()

    def answer(asked: Asked) -> list[Any]:
        with torch.inference_mode():
            given = [array.item() if array.shape == () else torch.from_numpy(array) for array in asked.values()]
            return [module(*given).numpy()]

    return answer


def _saved(path: Path) -> Callable[[Asked], list[Any]]:
    """By the loader of TensorFlow 1, which reads the graph and not the objects around it."""
    import tensorflow as tf  # noqa: PLC0415 - only the child

    tf.compat.v1.disable_eager_execution()
    one = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    session = tf.compat.v1.Session(config=one)
    signature = tf.compat.v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
    outputs = [tensor.name for _, tensor in sorted(signature.outputs.items())]

    def answer(asked: Asked) -> list[Any]:
        found: list[Any] = session.run(outputs, {signature.inputs[name].name: array for name, array in asked.items()})
        return found

    return answer


def main() -> None:
    path, requests, answers = map(Path, sys.argv[1:])
    answer = {".tflite": _lite, ".jit": _script, "": _saved}[path.suffix](path)
    for file in sorted(requests.iterdir()):
        with np.load(file, allow_pickle=False) as arrays:
            np.savez(answers / file.name, *answer(dict(arrays)))


if __name__ == "__main__":
    main()
