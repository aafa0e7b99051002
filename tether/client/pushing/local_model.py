"""Prepares a local file or folder for a push: platform, files cut into chunks, skipped files."""

from __future__ import annotations

import itertools
import json
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from tether.client.operations import Json
from tether.client.pushing.conversions import conversion
from tether.domain.file_names import fault_of, shown
from tether.errors import InvalidRequest

FORMATS = {
    ".onnx": ("model.onnx", "onnxruntime_onnx"),
    ".pt2": ("model.pt2", "pytorch_export"),
    ".pt": ("model.pt", "pytorch_libtorch"),
    ".ts": ("model.pt", "pytorch_libtorch"),
    ".jit": ("model.pt", "pytorch_libtorch"),
    ".torchscript": ("model.pt", "pytorch_libtorch"),
    ".safetensors": ("model.safetensors", "pytorch_safetensors"),
    ".tflite": ("model.tflite", "tensorflow_lite"),
}
"""File extension -> file name in the store, and platform."""

BUNDLES = {
    "model.onnx": "onnxruntime_onnx",
    "saved_model.pb": "tensorflow_savedmodel",
    "model.pt2": "pytorch_export",
    "model.pt": "pytorch_libtorch",
    "model.safetensors": "pytorch_safetensors",
    "model.tflite": "tensorflow_lite",
    "model.py": "python",
}
"""File in a folder -> platform of the folder; the first match wins."""

DESCRIBED = {"pytorch_libtorch": "model.json", "pytorch_safetensors": "model.json"}
"""Platform -> description file of a model without its own signature, beside it or with its stem and .json."""

ALONE = frozenset({"pytorch_export", "pytorch_libtorch", "pytorch_safetensors", "tensorflow_lite"})
"""Platforms of a single file and its description; other files of a folder are skipped."""
_PAPERS = frozenset({".json", ".txt", ".md", ".yaml", ".yml", ".jinja"})
"""Extensions of files beside exported ONNX models that hold no weights: tokenizers, settings, read-mes."""
SAMPLE = "tether-sample.json"
MOST_FILES = 1024


@dataclass(frozen=True)
class LocalFile:
    """A file to push: digest, offset and bytes of each chunk, in order."""

    source: Path
    path: str
    digest: str
    chunks: tuple[tuple[str, int, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.chunks)

    def described(self) -> Json:
        """Return the file as ``versions:register`` takes it."""
        chunks, sizes = [digest for digest, _, _ in self.chunks], [size for _, _, size in self.chunks]
        return {"path": self.path, "size": self.size, "digest": self.digest, "chunks": chunks, "sizes": sizes}


class LocalModel(NamedTuple):
    """A model to push; ``skipped`` names files of the folder that are not pushed."""

    platform: str
    files: Sequence[LocalFile]
    skipped: tuple[str, ...] = ()


def local_model(path: Path) -> LocalModel:
    """Return a model's platform and its files cut into chunks; reads each file once, follows no symbolic
    link.

    Raises:
        InvalidRequest: it does not exist, cannot be read, or has no supported format.
    """
    _check_link(path)
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidRequest(f"no such file or folder: {str(path)!r}", field="path") from error
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read {str(path)!r}: {error}", field="path") from error
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        raise InvalidRequest(f"{str(path)!r} is neither a file nor a folder", field="path")
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise InvalidRequest(_unknown(path), field="path")
    name, platform = known
    files = [_local_file(path, name)]
    if platform in DESCRIBED:
        files.append(_local_file(_description(path, DESCRIBED[platform]), DESCRIBED[platform]))
    return LocalModel(platform, files)


def _unknown(path: Path) -> str:
    helps = conversion(path)
    if helps:
        return f"{path.name!r} is {helps}"
    return f"unsupported model file {path.name!r}; expected {_KNOWN}"


_KNOWN = f"a file with the extension {', '.join(FORMATS)}, or a folder with one of {', '.join(BUNDLES)}"


def _description(path: Path, name: str) -> Path:
    for source in (path.with_suffix(".json"), path.with_name(name)):
        if source.is_file():
            return source
    raise _undescribed(path, name)


def _undescribed(path: Path, name: str) -> InvalidRequest:
    if path.suffix.lower() != ".safetensors" and _is_pickle(path):
        return InvalidRequest(f"{path.name!r} is {conversion(path.with_suffix('.pth'))}", field="path")
    names = " or ".join(dict.fromkeys((path.with_suffix(".json").name, name)))
    example = '{"name": "x", "datatype": "FP32", "shape": [-1, 3]}'
    other = (
        "; or export the model to ONNX, a folder of Hugging Face with 'optimum-cli export onnx --model FOLDER NEW_FOLDER'"
        if path.suffix == ".safetensors"
        else ""
    )
    return InvalidRequest(
        f"{path.name!r} does not contain its signature; describe it in {names} beside it, as in "
        f'{{"inputs": [{example}], "outputs": [...]}}; -1 is an axis of any length{other}',
        field="path",
    )


def _is_pickle(path: Path) -> bool:
    """Return True if torch.save wrote the file; torch.jit.save writes an archive with code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        with path.open("rb") as file:
            return file.read(1) == b"\x80"


# folders


def _folder(folder: Path) -> LocalModel:
    skipped: list[str] = []
    found = dict(_walk(folder, "", skipped))
    platform = _declared_platform(found) or next((served for file, served in BUNDLES.items() if file in found), None)
    if platform is None:
        platform, found = _renamed(folder, found)
    if platform in DESCRIBED and DESCRIBED[platform] not in found:
        raise _undescribed(
            next(source for path, source in found.items() if BUNDLES.get(path) == platform), DESCRIBED[platform]
        )
    left_out = [path for path in found if _is_left_out(platform, path)]
    files = [_local_file(source, path) for path, source in sorted(found.items()) if path not in left_out]
    if len(files) > MOST_FILES:
        raise InvalidRequest(
            f"the folder {folder} has {len(files)} files; at most {MOST_FILES} are allowed", field="path"
        )
    return LocalModel(platform, files, tuple(sorted(skipped + left_out)))


def _walk(folder: Path, below: str, skipped: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield path in the store and source of every file; add hidden ones to ``skipped``."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InvalidRequest(f"cannot read {folder}: {error.strerror}", field="path") from error
    for entry in entries:
        path = below + entry.name
        if entry.name.startswith("."):
            skipped.append(path)
        elif entry.is_symlink():
            _check_link(Path(entry.path))
        elif entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__":
                yield from _walk(Path(entry.path), f"{path}/", skipped)
        elif not entry.is_file(follow_symlinks=False):
            raise InvalidRequest(f"{shown(path)} in the folder is not a regular file; remove it", field="path")
        elif fault := fault_of(path):
            raise InvalidRequest(f"the file {shown(path)} cannot be pushed: {fault}; rename it", field="path")
        else:
            yield path, Path(entry.path)


def _declared_platform(found: dict[str, Path]) -> str:
    """Return the platform in ``model.json``, which a folder for a runtime plugin has; Python if it names a
    class."""
    try:
        described = json.loads(found["model.json"].read_bytes())
    except (KeyError, OSError, ValueError, RecursionError):
        return ""  # the model store reports invalid JSON
    if not isinstance(described, dict):
        return ""
    platform = described.get("platform", "python" if "className" in described and "model.py" in found else "")
    return platform if isinstance(platform, str) else ""


def _renamed(folder: Path, found: dict[str, Path]) -> tuple[str, dict[str, Path]]:
    """Return a folder with its only model file, and its description, under their names in the store."""
    models = [path for path in found if "/" not in path and PurePath(path).suffix.lower() in FORMATS]
    if len(models) > 1:
        raise InvalidRequest(
            f"the folder {folder} has several models: {', '.join(map(shown, models[:8]))}; push one of the files, or "
            f"rename one to {FORMATS[PurePath(models[0]).suffix.lower()][0]}",
            field="path",
        )
    if not models and "model.json" in found:
        raise InvalidRequest(f"the folder {folder} has model.json, but no model.py beside it", field="path")
    if not models:
        helps = next((f"; {shown(path)} is {text}" for path in found if (text := conversion(PurePath(path)))), "")
        raise InvalidRequest(
            f"the folder {folder} has no model; expected one of {', '.join(BUNDLES)}, or a file with the extension "
            f"{', '.join(FORMATS)}{helps}",
            field="path",
        )
    name, platform = FORMATS[PurePath(models[0]).suffix.lower()]
    renamed = {name: found.pop(models[0])}
    described = PurePath(models[0]).with_suffix(".json").name
    if platform in DESCRIBED and described in found and DESCRIBED[platform] not in found:
        renamed[DESCRIBED[platform]] = found.pop(described)
    return platform, found | renamed


def _is_left_out(platform: str, path: str) -> bool:
    """Return True if a file of the folder is not part of the model."""
    if path == SAMPLE:
        return False
    if platform in ALONE:
        return path not in {name for name, served in FORMATS.values() if served == platform} | {DESCRIBED.get(platform)}
    return platform == "onnxruntime_onnx" and PurePath(path).suffix.lower() in _PAPERS


# files


def _check_link(path: Path) -> None:
    try:
        is_link = path.is_symlink()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read {str(path)!r}: {error}", field="path") from error
    if is_link:
        raise InvalidRequest(
            f"{str(path)!r} is a symbolic link, which a push does not follow; push its target, or a copy of it "
            "('cp -rL FOLDER COPY' copies a folder without links)",
            field="path",
        )


def _local_file(source: Path, path: str) -> LocalFile:
    from tether.domain.chunking import cut_file  # noqa: PLC0415 - only a push needs the library that cuts

    _check_link(source)
    try:
        with _opened(source) as file:
            cutter = cut_file(file)
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}", field="path") from error
    if not cutter.sizes and path in BUNDLES:
        raise InvalidRequest(f"{str(source)!r} is empty: it has 0 bytes; export or download it again", field="path")
    offsets = itertools.accumulate(cutter.sizes, initial=0)
    chunks = tuple(zip(cutter.digests, offsets, cutter.sizes, strict=False))
    return LocalFile(source, path, cutter.digest, chunks)


def read_chunk(source: Path, offset: int, size: int) -> bytes:
    """Read bytes of a file that is being pushed.

    Raises:
        InvalidRequest: it can no longer be read.
    """
    try:
        with _opened(source) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}", field="path") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file, but not a link that has replaced it meanwhile."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
