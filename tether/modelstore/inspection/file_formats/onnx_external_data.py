"""Checks an ONNX model's external data: weights stored in other files.

Only files of the same version are accepted: plain names below the model's folder, and whole ranges within
them.
The keys are those of ``TensorProto.external_data``; further keys of ONNX Runtime (``prepacked...``) are
refused.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tether.errors import ModelRejected, UnsafeModel
from tether.model import sample
from tether.storage.upload import MODEL_PATH

LONGEST = 1024
"""Maximum bytes of a key or a value of ``external_data``."""

MAX_AXES = 64
_KEYS = {"location", "offset", "length", "checksum"}
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._ ()+,@=-]{0,127}"
_LOCATION = re.compile(rf"{_NAME}(?:/{_NAME}){{0,7}}")
"""Stricter than file names: ONNX Runtime gives some names a meaning beyond paths (``*/_ORT_MEM_ADDR_/``)."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
}
"""``TensorProto.DataType`` -> bits per element; strings (8) have no fixed size, so they cannot be external."""


class External(NamedTuple):
    """An initializer's values: ``size`` bytes at ``offset`` of the file ``location``."""

    tensor: str
    location: str
    offset: int
    size: int


def unsafe(tensor: str, why: str) -> UnsafeModel:
    """Return the refusal of one tensor; ``why`` continues after its name."""
    return UnsafeModel(
        f"tensor '{tensor[:64]}', whose values are in another file (external data), {why}; save the model again with "
        "onnx.save(model, 'model.onnx', save_as_external_data=True, location='weights.bin')",
        field="file",
    )


def reference(tensor: str, entries: Sequence[tuple[str, str]], kind: int, axes: Sequence[int]) -> External:
    """Parse the ``external_data`` entries of an initializer; ``kind`` is its element type.

    Raises:
        UnsafeModel: they are not a range of a file beside the model.
    """
    said = dict(entries)
    if len(said) != len(entries) or not said.keys() <= _KEYS:
        raise unsafe(tensor, "has an unknown or repeated key for their location")
    location = said.get("location", "")
    if _LOCATION.fullmatch(location) is None or location == MODEL_PATH:
        raise unsafe(tensor, "does not name a plain file beside the model")
    numbers = {key: said.get(key, "0") for key in ("offset", "length")}
    if not all(_NUMBER.fullmatch(text) for text in numbers.values()):
        raise unsafe(tensor, "does not name a range of bytes")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if kind not in _BITS or len(axes) > MAX_AXES or any(axis >= 1 << 48 for axis in axes):
        raise unsafe(tensor, "has an element type that cannot be external")
    size = -(-math.prod(axes) * _BITS[kind] // 8)
    if length not in (0, size):
        raise unsafe(tensor, f"has {size} bytes, but {length} are declared")
    return External(tensor, location, offset, size)


def check_files(directory: Path, external: Sequence[External]) -> None:
    """Check that every referenced file exists, is a plain file and long enough, and that there are no others.

    Raises:
        UnsafeModel: a name is a link, or a range is not within its file.
        ModelRejected: a file is missing, or not referenced.
    """
    sizes: dict[str, int] = {}
    for part in external:
        if part.location not in sizes:
            sizes[part.location] = _size(directory, part)
        if part.offset + part.size > sizes[part.location]:
            raise unsafe(
                part.tensor,
                f"exceeds the end of '{part.location[:64]}', which has {sizes[part.location]} bytes (a "
                "download that broke "
                "off leaves such a file)",
            )
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and name not in (MODEL_PATH, sample.PATH) and name not in sizes:
            raise ModelRejected(
                f"no weights of the model are in the file '{name[:64]}'; push a folder without it", field="files"
            )


def _size(directory: Path, part: External) -> int:
    """Return a file's size; only a file without other hard links is known to belong to the version."""
    path = directory
    for name in Path(part.location).parts:
        path /= name
        if path.is_symlink():
            raise unsafe(part.tensor, "names a link")
    try:
        found = path.lstat()
    except OSError as error:
        raise ModelRejected(
            f"the model keeps weights in the file '{part.location[:64]}' (external data), which is missing; "
            "push the folder that has both, with the model called model.onnx",
            field="files",
        ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise unsafe(part.tensor, "names a link")
    return found.st_size
