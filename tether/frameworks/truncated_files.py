"""Detects model files cut off by a broken download or export, before a framework fails on them."""

from __future__ import annotations

import mmap
from pathlib import Path

import msgspec

from tether.errors import ModelRejected
from tether.frameworks.onnx.protobuf import CutOff, NotProtobuf, Reader

SAVED_MODEL = "saved_model.pb"
INDEX = "variables/variables.index"
_INDEX_ENDS = bytes.fromhex("57fb808b247547db")
"""Last bytes of a TensorFlow table (the magic number of LevelDB's format)."""
_FIELDS = 1000
"""Fields of a SavedModel: its version, and one for each graph."""
_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads."""


def cut_off(path: str, size: int, reason: str) -> ModelRejected:
    """Return the error for a file that is too short; ``path`` is its path in the version."""
    return ModelRejected(
        f"the file '{path}' is cut off: it ends after {size} bytes, {reason}; download or export it again", field="file"
    )


def check_saved_model(directory: Path) -> None:
    """Check graph and index of a SavedModel.

    Raises:
        ModelRejected: one of them is cut off, or has another format.
    """
    with (directory / SAVED_MODEL).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        try:
            for _ in Reader(data, _FIELDS).fields(0, size):
                pass
        except CutOff as error:
            raise cut_off(SAVED_MODEL, size, "in the middle of a field") from error
        except NotProtobuf as error:
            raise ModelRejected(
                f"the file '{SAVED_MODEL}' is not what tf.saved_model.save writes", field="file"
            ) from error
    index = directory / INDEX
    if index.is_file() and not (content := index.read_bytes()).endswith(_INDEX_ENDS):
        raise cut_off(INDEX, len(content), "without the end that every index has")


def check_safetensors(path: Path) -> None:
    """Compare the size of a safetensors file with its header.

    Raises:
        ModelRejected: it is shorter.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length <= _HEADER_BYTES and size < 8 + length):
            raise cut_off(path.name, size, "within its header")
        header = file.read(length) if length <= _HEADER_BYTES else b""
    try:
        tensors = msgspec.json.decode(header, type=dict[str, _Tensor])
    except (msgspec.MsgspecError, RecursionError):
        return  # another error, which the library reports
    whole = 8 + length + max((one.data_offsets[1] for one in tensors.values()), default=0)
    if size < whole:
        raise cut_off(path.name, size, f"and its header tells of {whole}")


class _Tensor(msgspec.Struct):
    """A tensor of the header, or its metadata, which has no range in the file."""

    data_offsets: tuple[int, int] = (0, 0)
