"""The part of ``export_models.py`` that makes networks of PyTorch, and their quantised forms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAKERS: dict[str, Callable[[Path], None]] = {}


def maker(function: Callable[[Path], None]) -> Callable[[Path], None]:
    MAKERS[function.__name__] = function
    return function


def torch_script(  # noqa: PLR0917 - as the exporter has them
    model: Any, example: Any, path: Path, inputs: list[str], outputs: list[str], axes: dict[str, Any], opset: int = 17
) -> None:
    """The exporter that follows TorchScript."""
    import torch

    torch.onnx.export(
        model.eval(),
        example,
        path,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )


def torch_export(  # noqa: PLR0917 - likewise
    model: Any, example: Any, path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    """The exporter that follows torch.export."""
    import torch

    torch.onnx.export(
        model.eval(),
        example,
        path,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        external_data=False,
    )


def batch() -> Any:
    import torch

    return torch.export.Dim("batch")


def small_mlp() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4), nn.LogSoftmax(1)
    )


@maker
def mlp_torchscript(path: Path) -> None:
    import torch

    torch_script(small_mlp(), torch.randn(2, 8), path, ["x"], ["y"], {"x": {0: "batch"}, "y": {0: "batch"}})


@maker
def mlp_dynamo(path: Path) -> None:
    import torch

    torch_export(small_mlp(), (torch.randn(2, 8),), path, ["x"], ["y"], ({0: batch()},))


def small_cnn() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.Softmax(-1),
    )


@maker
def cnn_torchscript(path: Path) -> None:
    import torch

    axes = {"image": {0: "batch", 2: "height", 3: "width"}, "scores": {0: "batch"}}
    torch_script(small_cnn(), torch.randn(2, 3, 16, 16), path, ["image"], ["scores"], axes)


@maker
def cnn_dynamo(path: Path) -> None:
    import torch

    torch_export(small_cnn(), (torch.randn(2, 3, 16, 16),), path, ["image"], ["scores"], ({0: batch()},))


@maker
def resnet_torchscript(path: Path) -> None:
    import torch
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    _thin(model, 32)
    torch_script(
        model, torch.randn(2, 3, 32, 32), path, ["image"], ["scores"], {"image": {0: "batch"}, "scores": {0: "batch"}}
    )


def _thin(model: Any, by: int) -> None:
    """Give every layer a part of its channels."""
    from torch import nn

    for name, layer in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if isinstance(layer, nn.Conv2d):
            inner = layer.in_channels if layer.in_channels == 3 else layer.in_channels // by
            setattr(
                parent,
                last,
                nn.Conv2d(inner, layer.out_channels // by, layer.kernel_size, layer.stride, layer.padding, bias=False),
            )
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(parent, last, nn.BatchNorm2d(layer.num_features // by))
        elif isinstance(layer, nn.Linear):
            setattr(parent, last, nn.Linear(layer.in_features // by, layer.out_features))


class _Recurrent:
    """A recurrent layer over text, made when torch is there."""

    @staticmethod
    def make(*, first: bool) -> Any:
        import torch
        from torch import nn

        class Tagger(nn.Module):  # type: ignore[misc]  # without torch it has no type
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(50, 6)
                self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=first)
                self.gru = nn.GRU(10, 4, batch_first=first)
                self.out = nn.Linear(4, 3)

            def forward(self, tokens: Any) -> Any:
                found = self.table(tokens)
                found = found if first else found.transpose(0, 1)
                found, _ = self.gru(self.lstm(found)[0])
                return torch.softmax(self.out(found[:, -1] if first else found[-1]), -1)

        return Tagger()


@maker
def lstm_torchscript(path: Path) -> None:
    import torch

    tokens = torch.randint(0, 50, (2, 7))
    axes = {"tokens": {0: "batch", 1: "time"}, "scores": {0: "batch"}}
    torch_script(_Recurrent.make(first=True), tokens, path, ["tokens"], ["scores"], axes)


@maker
def lstm_time_first_torchscript(path: Path) -> None:
    import torch

    tokens = torch.randint(0, 50, (2, 7))
    axes = {"tokens": {0: "batch", 1: "time"}, "scores": {0: "batch"}}
    torch_script(_Recurrent.make(first=False), tokens, path, ["tokens"], ["scores"], axes)


def transformer() -> Any:
    from torch import nn

    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


@maker
def transformer_torchscript(path: Path) -> None:
    import torch

    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    torch_script(transformer(), torch.randn(2, 5, 16), path, ["x"], ["y"], axes)


@maker
def transformer_dynamo(path: Path) -> None:
    import torch

    shapes = ({0: batch(), 1: torch.export.Dim("time", min=2)},)
    torch_export(transformer(), (torch.randn(2, 5, 16),), path, ["x"], ["y"], shapes)


def _quantised(path: Path, *, dynamic: bool) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization import CalibrationDataReader

    class Rows(CalibrationDataReader):  # type: ignore[misc]  # its package has no types here
        def __init__(self) -> None:
            self._left = [{"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)} for _ in range(4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self._left.pop() if self._left else None

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain.onnx")
        mlp_torchscript(plain)
        if dynamic:
            quantization.quantize_dynamic(plain, path)
        else:
            quantization.quantize_static(plain, path, Rows())


@maker
def mlp_static_int8(path: Path) -> None:
    _quantised(path, dynamic=False)


@maker
def mlp_dynamic_int8(path: Path) -> None:
    _quantised(path, dynamic=True)
