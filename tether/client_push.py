"""Pushing models as a flow: cut here, ask what is missing, send that, make a version of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tether.client_flows import Counted, Json, model_path, post
from tether.client_http import (
    Flow,
    Patience,
    Policy,
    Progress,
    Send,
    Together,
    Waiting,
    exchange,
    exchange_json,
    unwatched,
)
from tether.errors import InvalidRequest

PUSH_TIMEOUT_S = 600.0

WIDTH = 4
"""Pieces that are on their way at a time."""

LOOKUP = 4096
"""Pieces of one ``chunks:missing`` request."""


@dataclass(frozen=True)
class LocalFile:
    """A file to push, and how it is cut: digest, offset and bytes of each piece, in order."""

    source: Path
    path: str
    digest: str
    pieces: tuple[tuple[str, int, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.pieces)

    def described(self) -> Json:
        """The file as ``versions:register`` takes it."""
        chunks, sizes = [digest for digest, _, _ in self.pieces], [size for _, _, size in self.pieces]
        return {"path": self.path, "size": self.size, "digest": self.digest, "chunks": chunks, "sizes": sizes}


class _Missing(msgspec.Struct):
    """What a gateway answers; an older one knows nothing of encryption."""

    missing: list[str]
    encrypt: bool | None = None


FORMATS = {
    ".onnx": ("model.onnx", "onnxruntime_onnx"),
    ".pt2": ("model.pt2", "pytorch_export"),
    ".pt": ("model.pt", "pytorch_libtorch"),
    ".ts": ("model.pt", "pytorch_libtorch"),
    ".safetensors": ("model.safetensors", "pytorch_safetensors"),
    ".tflite": ("model.tflite", "tensorflow_lite"),
}
"""End of a file's name -> what the file is called in the store, and the platform that serves it."""

BUNDLES = {
    "model.onnx": "onnxruntime_onnx",
    "saved_model.pb": "tensorflow_savedmodel",
    "model.pt": "pytorch_libtorch",
    "model.safetensors": "pytorch_safetensors",
    "model.tflite": "tensorflow_lite",
    "model.json": "python",
}
"""A file that a folder holds -> the platform that serves the folder; the first one that is there counts."""

DESCRIBED = {"pytorch_libtorch": "model.json", "pytorch_safetensors": "model.json"}
"""Platform -> the file that describes a model which does not describe itself, beside it or under its name with .json."""


def local_model(path: Path) -> tuple[str, list[LocalFile]]:
    """The platform of a model, and its files cut into pieces; reads all of them once.

    Raises:
        InvalidRequest: it cannot be read, or nothing here says what it is.
    """
    if path.is_dir():
        return _bundle(path)
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise InvalidRequest(
            f"{path.name!r} is no model that is known here: a file that ends in {', '.join(FORMATS)}, "
            f"or a folder with {' or '.join(BUNDLES)}",
            field="path",
        )
    name, platform = known
    files = [_local_file(path, name)]
    if platform in DESCRIBED:
        files.append(_description(path, DESCRIBED[platform]))
    return platform, files


def _description(path: Path, name: str) -> LocalFile:
    for source in (path.with_suffix(".json"), path.with_name(name)):
        if source.is_file():
            return _local_file(source, name)
    raise InvalidRequest(
        f"{path.name!r} does not say what its inputs and outputs are; "
        f"describe them in {path.with_suffix('.json').name} or {name} beside it",
        field="path",
    )


def _bundle(folder: Path) -> tuple[str, list[LocalFile]]:
    platform = _told(folder) or next((served for file, served in BUNDLES.items() if (folder / file).is_file()), None)
    if platform is None:
        raise InvalidRequest(f"the folder {folder} has no {' and no '.join(BUNDLES)}", field="path")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return platform, [_local_file(path, path.relative_to(folder).as_posix()) for path in files]


def _told(folder: Path) -> str:
    """The platform that ``model.json`` names, which is how a folder says that it is for a runtime of another package."""
    try:
        told = json.loads((folder / "model.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""  # whoever looks at the bundle says what is wrong with it
    platform = told.get("platform") if isinstance(told, dict) else None
    return platform if isinstance(platform, str) else ""


def _local_file(source: Path, path: str) -> LocalFile:
    from tether.pieces import cut_file  # noqa: PLC0415 - only a push needs the library that cuts

    try:
        cutter = cut_file(source)
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}", field="path") from error
    offsets = itertools.accumulate(cutter.sizes, initial=0)
    pieces = tuple(zip(cutter.digests, offsets, cutter.sizes, strict=False))
    return LocalFile(source, path, cutter.digest, pieces)


def push(
    policy: Policy,
    name: str,
    model: tuple[str, Sequence[LocalFile]],
    params: Mapping[str, Any],
    progress: Progress | None,
    *,
    encrypt: bool | None = None,
    waiting: Waiting | None = None,
) -> Flow[Json]:
    """Send the pieces that the store does not have, then make a version; ``progress`` counts those it has as done.

    All of it has one patience, of ``policy.timeout`` seconds: a gateway, broker or model store that restarts meanwhile is
    waited for, and ``waiting`` is told so.
    """
    patience = Patience(policy.monotonic() + policy.timeout, waiting or unwatched)
    policy = replace(policy, patience=patience)
    platform, files = model
    pieces = {digest: (file.source, offset, size) for file in files for digest, offset, size in file.pieces}
    missing, encrypt = yield from _missing(policy, name, list(pieces), encrypt)
    how = {} if encrypt is None else {"encrypt": str(encrypt).lower()}
    whole = sum(size for _, _, size in pieces.values())
    left = sum(pieces[digest][2] for digest in missing)
    counted = Counted(progress, whole - left)

    def stored(digest: str) -> Flow[int]:
        piece = _read(*pieces[digest])
        headers = {"content-type": "application/octet-stream"}
        path = f"{model_path(name)}/chunks/{digest}"
        yield from exchange(policy, Send("PUT", path, piece, headers=headers, params=how))
        return len(piece)

    yield Together(map(stored, missing), WIDTH, counted.add)
    given = {key: value for key, value in {**params, "encrypt": encrypt}.items() if value is not None}
    body = {"files": [file.described() for file in files], "platform": platform, **given}
    patience.waiting("the model store looks at the model")
    told = yield from exchange_json(policy, post(f"{model_path(name)}/versions:register", body), dict[str, Any])
    return {**told, "stored_bytes": left}


def _missing(
    policy: Policy, name: str, digests: Sequence[str], encrypt: bool | None
) -> Flow[tuple[list[str], bool | None]]:
    """Which pieces the store does not have, and whether the version is to be encrypted."""
    missing: list[str] = []
    for start in range(0, len(digests), LOOKUP):
        body: Json = {"chunks": digests[start : start + LOOKUP]}
        if encrypt is not None:
            body["encrypt"] = encrypt
        told = yield from exchange_json(policy, post(f"{model_path(name)}/chunks:missing", body), _Missing)
        missing += told.missing
        encrypt = told.encrypt
    return missing, encrypt


def _read(source: Path, offset: int, size: int) -> bytes:
    try:
        with source.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}", field="path") from error
