"""Accepted formats: for each platform its required files, whether they are programs, and the inspector."""

from __future__ import annotations

from dataclasses import dataclass

from tether.domain.manifest import ModelFile
from tether.errors import FormatNotAllowed, InvalidRequest, ModelRejected, PayloadTooLarge
from tether.frameworks import plugins
from tether.model import sample
from tether.storage.upload import LARGEST_ONNX, MODEL_PATH

ONNX = "onnxruntime_onnx"
PYTHON = "python"
TORCH_EXPORT = "pytorch_export"
TORCHSCRIPT = "pytorch_libtorch"
SAFETENSORS = "pytorch_safetensors"
SAVED_MODEL = "tensorflow_savedmodel"
TENSORFLOW_LITE = "tensorflow_lite"


@dataclass(frozen=True)
class Format:
    """One platform. ``needs`` are required paths, ``only`` forbids other files; the first path has at most
    ``largest`` bytes.

    ``signatures``: a file may have several, of which one is served.

    ``code``: loading it runs its code, so only a trusted publisher may push it. ``inspector`` is the
    inspecting module of this package; ``memory_mb`` is address space added to the need of the model's size.
    """

    platform: str
    needs: tuple[str, ...]
    inspector: str
    only: bool = False
    code: bool = True
    largest: int = 1 << 50
    memory_mb: int = 4096
    signatures: bool = False


FORMATS = {
    known.platform: known
    for known in (
        Format(ONNX, (MODEL_PATH,), "onnx", code=False, largest=LARGEST_ONNX),
        Format(PYTHON, ("model.json", "model.py"), "python_bundle"),
        Format(TORCH_EXPORT, ("model.pt2",), "pytorch", only=True, memory_mb=16384),
        Format(TORCHSCRIPT, ("model.json", "model.pt"), "pytorch", only=True, memory_mb=16384),
        Format(SAFETENSORS, ("model.safetensors", "model.json"), "pytorch", only=True, code=False, memory_mb=16384),
        Format(SAVED_MODEL, ("saved_model.pb",), "tensorflow", memory_mb=16384, signatures=True),
        Format(TENSORFLOW_LITE, ("model.tflite",), "litert", only=True, signatures=True),
    )
}


def format_of(platform: str) -> Format:
    """Return the format of a platform: built in, or from an installed package, whose models count as programs.

    Raises:
        InvalidRequest: the platform is unknown.
    """
    found, others = FORMATS.get(platform), plugins.installed(plugins.RUNTIMES)
    if found is None and platform in others:
        return Format(platform, (), "plugin", memory_mb=16384)
    if found is None:
        known = ", ".join(f"'{name}'" for name in (*FORMATS, *others))
        raise InvalidRequest(f"unknown platform '{platform[:64]}'; expected one of {known}", field="platform")
    return found


def check_files(platform: str, files: tuple[ModelFile, ...], *, trusted: bool, max_bytes: int) -> Format:
    """Return the format of a push if its files fit it.

    Raises:
        InvalidRequest: an unknown platform, or files that do not fit it.
        ModelRejected: the model's own file is empty.
        FormatNotAllowed: it is a program, and the publisher may not push programs.
        PayloadTooLarge: the files together are over a limit.
    """
    found = format_of(platform)
    paths = [file.path for file in files if file.path != sample.PATH]
    missing = [path for path in found.needs if path not in paths]
    if missing or (found.only and len(paths) != len(found.needs)) or len(set(paths)) != len(paths):
        needed = ", ".join(f"'{path}'" for path in found.needs)
        words = ("exactly" if found.only else "at least") + (" the files" if len(found.needs) > 1 else " the file")
        raise InvalidRequest(f"a version for '{platform}' has {words} {needed}, each once", field="files")
    empty = next((file.path for file in files if file.path in found.needs and not file.size), "")
    if empty:
        raise ModelRejected(f"the file '{empty}' is empty: it has 0 bytes; export or download it again", field="files")
    if found.code and not trusted:
        raise FormatNotAllowed(
            f"a model for '{platform}' is a program; pushing it needs an API key with the scope 'models:code'",
            field="platform",
        )
    _check_sizes(found, files, max_bytes)
    return found


def _check_sizes(found: Format, files: tuple[ModelFile, ...], max_bytes: int) -> None:
    size = sum(file.size for file in files)
    if size > max_bytes:
        raise PayloadTooLarge(f"the model has {size} bytes; at most {max_bytes} are allowed", field="files")
    for file in files:
        if file.path in found.needs[:1] and file.size > found.largest:
            raise PayloadTooLarge(
                f"'{file.path}' has {file.size} bytes; at most {found.largest} are allowed: keep its weights in a file "
                "beside it",
                field="files",
            )
