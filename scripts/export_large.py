"""The part of ``export_models.py`` that makes small copies of large networks: transformers and YOLO."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export_torch import batch, torch_export, torch_script

MAKERS: dict[str, Callable[[Path], None]] = {}


def maker(function: Callable[[Path], None]) -> Callable[[Path], None]:
    MAKERS[function.__name__] = function
    return function


def bert(kind: str = "BertModel", **more: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, **more,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def _optimum(model: Any, path: Path, task: str) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    with tempfile.TemporaryDirectory() as folder:
        onnx_export_from_model(model, folder, task=task, opset=17, do_validation=False)
        path.write_bytes(Path(folder, "model.onnx").read_bytes())


@maker
def bert_optimum(path: Path) -> None:
    _optimum(bert(), path, "feature-extraction")


@maker
def bert_classifier_optimum(path: Path) -> None:
    _optimum(bert("BertForSequenceClassification", num_labels=3), path, "text-classification")


@maker
def distilbert_optimum(path: Path) -> None:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=24
    )
    _optimum(transformers.DistilBertModel(config).eval(), path, "feature-extraction")


@maker
def roberta_optimum(path: Path) -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24,
    )  # fmt: skip
    _optimum(transformers.RobertaModel(config, add_pooling_layer=False).eval(), path, "feature-extraction")


def _hidden(model: Any) -> Any:
    import torch

    class Hidden(torch.nn.Module):  # type: ignore[misc]  # without torch it has no type
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Hidden()


def _bert_by(path: Path, attention: str, *, dynamo: bool) -> None:
    import torch

    ids = torch.randint(0, 60, (2, 7))
    model = _hidden(bert(attn_implementation=attention))
    names = ["input_ids", "attention_mask"]
    if dynamo:
        time = torch.export.Dim("time", min=2, max=24)
        torch_export(model, (ids, torch.ones_like(ids)), path, names, ["hidden"], ({0: batch(), 1: time},) * 2)
    else:
        axes = {name: {0: "batch", 1: "time"} for name in (*names, "hidden")}
        torch_script(model, (ids, torch.ones_like(ids)), path, names, ["hidden"], axes)


@maker
def bert_eager_torchscript(path: Path) -> None:
    _bert_by(path, "eager", dynamo=False)


@maker
def bert_sdpa_torchscript(path: Path) -> None:
    _bert_by(path, "sdpa", dynamo=False)


@maker
def bert_eager_dynamo(path: Path) -> None:
    _bert_by(path, "eager", dynamo=True)


@maker
def vit_optimum(path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    _optimum(transformers.ViTForImageClassification(config).eval(), path, "image-classification")


@maker
def yolo_ultralytics(path: Path) -> None:
    """YOLOv8 nano with two channels a layer, as ``model.export(format="onnx", dynamic=True)`` writes it."""
    import yaml
    from ultralytics import YOLO
    from ultralytics.utils import ROOT

    plan = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text())
    plan["scales"] = {"n": [0.1, 0.01, 64]}
    plan["nc"], plan["reg_max"] = 3, 4
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "yolov8n.yaml")
        file.write_text(yaml.safe_dump(plan))
        made = YOLO(str(file)).export(format="onnx", dynamic=True, imgsz=64, simplify=False, opset=17)
        path.write_bytes(Path(made).read_bytes())
