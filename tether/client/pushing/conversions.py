"""Recognizes files of unsupported model formats, with the command that converts each."""

from __future__ import annotations

from pathlib import PurePath

_KERAS = (
    "a Keras file; convert it: python -c \"import keras; keras.saving.load_model('{name}').export('{stem}')\", "
    "and push the folder {stem}"
)
_PICKLE = (
    "a pickle, and pickles are never loaded; where you have the model, write it as ONNX: "
    "skl2onnx.to_onnx(model, X[:1], options={{'zipmap': False}}) for scikit-learn, torch.onnx.export(model, args, "
    "'{stem}.onnx', dynamo=True) for PyTorch"
)
_TORCH = (
    "a file of torch.save, a pickle, and pickles are never loaded; where you have the model, write it with "
    "torch.onnx.export(model, args, '{stem}.onnx', dynamo=True) or torch.export.save(torch.export.export(model, args), "
    "'{stem}.pt2')"
)
_XGBOOST = (
    "a model of XGBoost; convert it with onnxmltools: convert_xgboost(model, "
    "initial_types=[('x', FloatTensorType([None, N]))])"
)
_LIGHTGBM = (
    "a model of LightGBM; convert it with onnxmltools: convert_lightgbm(model, initial_types=[('x', "
    "FloatTensorType([None, N]))], zipmap=False)"
)
_ENGINE = "built for one kind of GPU; push the ONNX file that it was built from"
_PACKED = "an archive; unpack it and push the folder or the model file in it"
_PADDLE = (
    "a model of Paddle; convert it: paddle2onnx --model_dir . --model_filename {stem}.pdmodel "
    "--params_filename {stem}.pdiparams --save_file {stem}.onnx"
)
_KINDS = {
    ".keras": _KERAS,
    ".h5": _KERAS,
    ".hdf5": _KERAS,
    ".pkl": _PICKLE,
    ".pickle": _PICKLE,
    ".joblib": _PICKLE,
    ".dill": _PICKLE,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".ckpt": _TORCH,
    ".pb": (
        "a frozen graph of TensorFlow; convert it: python -m tf2onnx.convert --graphdef {name} --output {stem}.onnx "
        "--inputs INPUT:0 --outputs OUTPUT:0 (a SavedModel is pushed as its folder)"
    ),
    ".mlmodel": "a model of Core ML; convert it with onnxmltools: convert_coreml(coremltools.utils.load_spec('{name}'))",
    ".cbm": "a model of CatBoost; write it as ONNX: model.save_model('{stem}.onnx', format='onnx')",
    ".ubj": _XGBOOST,
    ".xgb": _XGBOOST,
    ".bst": _XGBOOST,
    ".lgb": _LIGHTGBM,
    ".lgbm": _LIGHTGBM,
    ".pdmodel": _PADDLE,
    ".pdiparams": _PADDLE,
    ".ort": "in ONNX Runtime's own format; push the .onnx file that it was made from",
    ".engine": _ENGINE,
    ".plan": _ENGINE,
    ".trt": _ENGINE,
    ".xml": "in OpenVINO's format, if it is a model; push its original model as ONNX",
    ".gguf": "for llama.cpp, which serves it itself; for Tether, export its original model as ONNX",
    ".zip": _PACKED,
    ".tar": _PACKED,
    ".gz": _PACKED,
    ".tgz": _PACKED,
    ".mar": _PACKED,
}


def conversion(path: PurePath) -> str:
    """Return a file's format and how to convert it; empty if its name does not tell."""
    kind = _KINDS.get(path.suffix.lower(), "")
    return kind.format(name=path.name, stem=path.stem)
