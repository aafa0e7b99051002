"""Checks a PyTorch file before PyTorch opens it: an archive of ``torch.export.save`` or ``torch.jit.save``.

A pickle of ``torch.save`` is refused, as are libraries and pickled objects in an exported program.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES
from tether.errors import FormatNotAllowed, InspectionLimitExceeded, ModelRejected
from tether.frameworks.truncated_files import check_safetensors

EXPORTED = "model.pt2"
SCRIPTED = "model.pt"
SIGNATURE = "model.json"

_EXPORTED_MEMBER = re.compile(
    r"[^/]*/(archive_format|archive_version|byteorder|\.data/[a-z_]+|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|"
    r"extra/.*)"
)
_SCRIPT_MEMBERS = (re.compile(r"[^/]+/constants\.pkl"), re.compile(r"[^/]+/code/.+\.py"))
_SWELLING = 64 << 20
"""Bytes that an archive may unpack to, beyond 20 times its own size."""


WEIGHTS = "model.safetensors"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model.json`` of a TorchScript file, which lacks a signature: its arguments and outputs, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Registered(Signature, frozen=True, forbid_unknown_fields=True):
    """``model.json`` of weights alone: a :class:`Signature`, the architecture, and its configuration."""

    architecture: str
    config: Mapping[str, Any] = {}


_Described = TypeVar("_Described", bound=Signature)


def check(directory: Path) -> None:
    """Check the ``model.pt2`` or ``model.pt`` of a folder; ``model.safetensors``, whose format is data, must
    be complete.

    Raises:
        ModelRejected: the file is cut off.
        FormatNotAllowed: the file has pickled Python or libraries, or is not an archive.
        InspectionLimitExceeded: it would unpack to far more than its size.
    """
    exported = directory / EXPORTED
    if (directory / WEIGHTS).is_file():
        return check_safetensors(directory / WEIGHTS)
    return _check_exported(exported) if exported.is_file() else _check_scripted(directory / SCRIPTED)


def _check_exported(path: Path) -> None:
    for member in _members(path):
        if _EXPORTED_MEMBER.fullmatch(member) is None:
            raise FormatNotAllowed(
                f"{path.name} holds '{member[-64:]}', which no program of torch.export.save needs: "
                "pickled objects, libraries and files of older versions are refused",
                field="file",
            )


def _check_scripted(path: Path) -> None:
    members = _members(path)
    if not all(any(needed.fullmatch(member) for member in members) for needed in _SCRIPT_MEMBERS):
        raise FormatNotAllowed(
            f"{path.name} is not TorchScript: torch.save writes pickled Python; use torch.jit.save or "
            "torch.export.save",
            field="file",
        )


def signature(directory: Path, kind: type[_Described]) -> _Described:
    """Read the signature of a model whose file has none.

    Raises:
        ModelRejected: it is invalid.
    """
    path = directory / SIGNATURE
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelRejected(f"{SIGNATURE} is invalid: {error}", field=SIGNATURE) from error
    for spec in (*found.inputs, *found.outputs):
        if spec.datatype not in NUMPY_DTYPES or any(axis < -1 for axis in spec.shape):
            raise ModelRejected(f"tensor '{spec.name[:64]}' has no datatype or shape that PyTorch has", field=SIGNATURE)
    if not found.outputs or any(
        len({spec.name for spec in side}) != len(side) for side in (found.inputs, found.outputs)
    ):
        raise ModelRejected("there must be outputs, and each name only once", field=SIGNATURE)
    return found


def _what(path: Path) -> str:
    """Describe a file that is not an archive."""
    size = path.stat().st_size
    if not size:
        return "empty: it has 0 bytes; export or download it again"
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if begins:
        return f"cut off: it begins as an archive, and ends after {size} bytes without its list of files; download or export it again"
    return "not what torch.jit.save or torch.export.save writes"


def _members(path: Path) -> list[str]:
    """Return the names in an archive.

    Raises:
        FormatNotAllowed: it is not an archive.
        InspectionLimitExceeded: it would unpack to far more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise FormatNotAllowed(f"{path.name} is {_what(path)}") from error
    if sum(member.file_size for member in members) > 20 * path.stat().st_size + _SWELLING:
        raise InspectionLimitExceeded(f"{path.name} would unpack to more than 20 times its size", field="file")
    return [member.filename for member in members]
