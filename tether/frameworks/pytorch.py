"""Runs PyTorch models without their own Python: programs of ``torch.export``, TorchScript, and weights of installed
architectures.

:mod:`tether.frameworks.pytorch_archive` checks a file before PyTorch opens it; all later unpickling is
limited to tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch.utils import _pytree as pytree

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import Array
from tether.errors import InferenceFailed, ModelRejected, OutputMisfit
from tether.frameworks import plugins, pytorch_archive

DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


class _Loaded(NamedTuple):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[list[Any]], list[Any]]
    """Maps the inputs' tensors to the outputs', both in order."""


class TorchModel:
    """A loaded PyTorch model and its signature; see :class:`tether.frameworks.runtime.Runtime`."""

    def __init__(self, loaded: _Loaded, device: Any) -> None:
        self.inputs, self.outputs, self._call = loaded
        self._device = device
        self._index = {spec.name: index for index, spec in enumerate(self.outputs)}

    @property
    def output_names(self) -> Sequence[str]:
        return tuple(self._index)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names the requested outputs, empty for all in the model's order.

        Raises:
            OutputMisfit: the outputs do not match the model's signature.
        """
        with torch.inference_mode():
            tensors = [_tensor(inputs[spec.name]).to(self._device) for spec in self.inputs]
            found = self._call(tensors)
            if len(found) != len(self.outputs):
                raise OutputMisfit(f"the model returned {len(found)} values, its signature has {len(self.outputs)}")
            wanted = [self._index[name] for name in outputs or self._index]
            return [_array(self.outputs[index], found[index]) for index in wanted]

    def close(self) -> None:
        self._call = _gone


Wrap = Callable[[Any], Any]
"""Replaces the call of a module."""


def load(directory: Path, *, threads: int = 1, device: str = "auto", wrap: Wrap = lambda module: module) -> TorchModel:
    """Load the ``model.pt2``, ``model.pt`` or ``model.safetensors`` of a folder; ``device`` is ``auto``,
    ``cpu`` or ``cuda``.

    ``wrap`` receives the module, unless that is TorchScript, which is already compiled.

    Raises:
        FormatNotAllowed: the file has pickled Python or libraries.
        ModelRejected: PyTorch, the signature or the architecture refuses it.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.export.load does not request this itself
    torch.set_num_threads(threads)
    chosen = _device(device)
    pytorch_archive.check(directory)
    return TorchModel(_loaded(directory, chosen, wrap), chosen)


def _loaded(directory: Path, device: Any, wrap: Wrap) -> _Loaded:
    exported = directory / pytorch_archive.EXPORTED
    if exported.is_file():
        return _exported(exported, device, wrap)
    if (directory / pytorch_archive.WEIGHTS).is_file():
        return _registered(directory, device, wrap)
    signature = pytorch_archive.signature(directory, pytorch_archive.Signature)
    module: Any = torch.jit.load(directory / pytorch_archive.SCRIPTED, map_location=device).eval()
    return _described(module, signature)


def _device(wanted: str) -> Any:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ModelRejected("model_device is 'cuda', but PyTorch finds no such device here")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def _exported(path: Path, device: Any, wrap: Wrap) -> _Loaded:
    program = torch.export.load(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415 - only where there is a device

        program = move_to_device_pass(program, str(device))
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = tuple(_spec(name, name, values) for name in program.graph_signature.user_inputs)
    nodes = program.graph_signature.user_outputs
    names = _output_names(program.call_spec.out_spec, len(nodes))
    outputs = tuple(_spec(name, node, values) for name, node in zip(names, nodes, strict=True))
    module, in_spec = wrap(program.module()), program.call_spec.in_spec

    def call(tensors: list[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(tensors, in_spec)
        return list(pytree.tree_leaves(module(*args, **kwargs)))

    return _Loaded(inputs, outputs, call)


def _output_names(spec: Any, count: int) -> list[str]:
    """Return the keys of a dictionary that the model returns; else ``OUTPUT__0`` and so on, as in Triton."""
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return [str(key) for key in spec.context]
    return [f"OUTPUT__{index}" for index in range(count)]


def _spec(name: str, node: Any, values: Mapping[str, Any]) -> TensorSpec:
    value = values.get(node) if isinstance(node, str) else None
    if not isinstance(value, torch.Tensor):
        raise ModelRejected(f"'{str(name)[:64]}' of the exported program is no tensor; only tensors can be served")
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return TensorSpec(name, _datatype(name, value.dtype), shape)


def _datatype(name: str, dtype: Any) -> str:
    datatype = DATATYPES.get(dtype)
    if datatype is None:
        raise ModelRejected(f"'{name[:64]}' holds {dtype}, which OIP has no datatype for; cast it to float32")
    return datatype


def _registered(directory: Path, device: Any, wrap: Wrap) -> _Loaded:
    """Load safetensors weights, which are data and no program, into the module of an installed architecture."""
    from safetensors import SafetensorError  # noqa: PLC0415 - only where such a model is
    from safetensors.torch import load_model  # noqa: PLC0415 - likewise

    told = pytorch_archive.signature(directory, pytorch_archive.Registered)
    build = plugins.load(plugins.ARCHITECTURES, told.architecture, "architecture", "architecture")
    with _weights_left_empty():
        module = build(dict(told.config))
    if not isinstance(module, torch.nn.Module):
        raise ModelRejected(
            f"the architecture '{told.architecture[:64]}' made a {type(module).__name__}, not a torch.nn.Module",
            field="architecture",
        )
    try:
        load_model(module, directory / pytorch_archive.WEIGHTS, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ModelRejected(
            f"the weights are not those of '{told.architecture[:64]}': {' '.join(str(error).split())[:300]}",
            field="file",
        ) from error
    return _described(wrap(module.eval().requires_grad_(requires_grad=False).to(device)), told)


_DRAWN = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_", "sparse_",
)  # fmt: skip
"""Functions of ``torch.nn.init`` that fill a tensor with random numbers."""


@contextmanager
def _weights_left_empty() -> Iterator[None]:
    """Skip random initialisation meanwhile: the file has all parameters, and drawing takes longer than reading it."""
    originals = {name: getattr(torch.nn.init, name) for name in _DRAWN}
    for name, original in originals.items():
        setattr(torch.nn.init, name, _sparing(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.nn.init, name, original)


def _sparing(original: Callable[..., Any]) -> Callable[..., Any]:
    def fill(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if isinstance(tensor, torch.nn.Parameter) else original(tensor, *args, **kwargs)

    return fill


def _described(module: Any, signature: pytorch_archive.Signature) -> _Loaded:
    """Wrap a module that does not include its signature."""

    def call(tensors: list[Any]) -> list[Any]:
        answer = module(*tensors)
        if not isinstance(answer, Mapping):
            return list(answer) if isinstance(answer, list | tuple) else [answer]
        missing = [spec.name for spec in signature.outputs if spec.name not in answer]
        if missing:
            raise OutputMisfit(f"the model returned no output '{missing[0][:64]}'")
        return [answer[spec.name] for spec in signature.outputs]

    return _Loaded(signature.inputs, signature.outputs, call)


def _tensor(array: Array) -> Any:
    """Return a copy: the array is read-only, and a model may write into its inputs."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _array(spec: TensorSpec, found: Any) -> Array:
    if not isinstance(found, torch.Tensor):
        raise OutputMisfit(f"output '{spec.name}' is a {type(found).__name__}, not a tensor")
    if DATATYPES.get(found.dtype) != spec.datatype or not _fits(spec.shape, found.shape):
        raise OutputMisfit(
            f"output '{spec.name}' is {found.dtype} of shape {list(found.shape)}; "
            f"the signature says {spec.datatype} of {list(spec.shape)}"
        )
    plain = found.detach().to("cpu").contiguous()
    if found.dtype == torch.bfloat16:
        bits: Array = plain.view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = plain.numpy()
    return array


def _fits(declared: tuple[int, ...], shape: Sequence[int]) -> bool:
    return len(declared) == len(shape) and all(want in (-1, have) for want, have in zip(declared, shape, strict=True))


def _gone(_tensors: list[Any]) -> list[Any]:
    raise InferenceFailed("the model is unloaded")
