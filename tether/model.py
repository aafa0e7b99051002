"""Models, versions, manifests, routes: frozen values without I/O."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec

from tether.errors import BadName, BadTensor
from tether.serving import NO_FINDING as NO_FINDING  # noqa: PLC0414 - handed on
from tether.serving import Assignment as Assignment  # noqa: PLC0414 - handed on
from tether.serving import Epoch as Epoch  # noqa: PLC0414 - handed on
from tether.serving import Finding as Finding  # noqa: PLC0414 - handed on
from tether.serving import Heartbeat as Heartbeat  # noqa: PLC0414 - handed on
from tether.serving import ModelRef as ModelRef  # noqa: PLC0414 - handed on
from tether.serving import Registration as Registration  # noqa: PLC0414 - handed on
from tether.serving import Route as Route  # noqa: PLC0414 - handed on
from tether.tensor import Tensor

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class TensorSpec(msgspec.Struct, frozen=True):
    """What a model declares of one input or output; -1 in ``shape`` is an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


FIXED_PIECE = 1 << 20
"""Bytes of every piece but the last in files that were not cut by their content."""


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a version. ``chunks`` are the SHA-256 digests (hex) of its pieces, in order, ``sizes`` their bytes.

    Versions from before there were ``sizes`` have none, and pieces of ``FIXED_PIECE`` bytes.
    """

    path: str
    size: int
    digest: str
    chunks: tuple[str, ...]
    sizes: tuple[int, ...] = ()

    def pieces(self) -> list[tuple[str, int]]:
        """Digest and bytes of every piece, in order."""
        if self.sizes:
            return list(zip(self.chunks, self.sizes, strict=True))
        left = range(self.size, 0, -FIXED_PIECE)
        return [(digest, min(FIXED_PIECE, rest)) for digest, rest in zip(self.chunks, left, strict=True)]


class SealedDigests(msgspec.Struct, frozen=True):
    """What an encrypted version's files and pieces really are: the plain digests, closed with the data key ``key_id``."""

    key_id: bytes
    box: bytes


PROVEN = "proven"
DECLARED = "declared"


class Batching(msgspec.Struct, frozen=True):
    """How jobs of a version are joined: rows per run, and how long a bundle may wait for company."""

    max_batch_size: int = 0
    """0: not batched, every job runs by itself."""
    max_delay_ms: float = 2.0
    basis: str = ""
    """Why rows of different callers may share a run: ``proven`` from the graph, or ``declared`` by the publisher. Empty
    when it is not batched, and in manifests from before there was a basis."""
    reason: str = ""
    """Why it is not batched, in one line; of a declared version, what its trial run said against it."""


class Isolation(StrEnum):
    """Where a model runs: in a thread of the worker, or in a process of its own."""

    THREAD = "thread"
    PROCESS = "process"


class Manifest(msgspec.Struct, frozen=True):
    """The description of an immutable version; a version exists when its signed manifest does.

    ``created_at`` is UTC seconds. ``platform`` is the OIP platform string.
    """

    name: str
    version: int
    platform: str
    files: tuple[ModelFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: Batching
    created_at: float
    publisher: str
    tenant: str = ""
    """Whose key pushed it, so whose quota its bytes count against; empty when no tenant did."""
    isolation: str = ""
    """Empty: as is usual for the platform, see :func:`isolation_of`."""
    run_timeout_s: float = 0.0
    """0: as long as the worker's setting allows."""
    sealed: SealedDigests | None = None
    """Of an encrypted version. The digests in ``files`` are then names that only holders of its key can compute."""
    partition: int = 0
    """Where its pieces are; versions from before there were several are in the first."""
    owner: str = ""
    """The tenant that owned the model when the version was made; empty in versions from before models had owners. Who
    owns it now, its :class:`~tether.ownership.Ownership` says."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def isolation_of(manifest: Manifest) -> Isolation:
    """Where a version runs: ONNX in the worker's own process and everything else in one of its own, unless it says so."""
    if manifest.isolation:
        return Isolation(manifest.isolation)
    return Isolation.THREAD if manifest.platform == "onnxruntime_onnx" else Isolation.PROCESS


AUTOMATIC = -1
"""As ``max_batch_size`` of a push: decide from the model itself."""


class PushRequest(msgspec.Struct, frozen=True):
    """Gateway to model store: make these stored files a version of ``name``. ``publisher`` is who pushed it."""

    name: str
    files: tuple[ModelFile, ...]
    max_batch_size: int = AUTOMATIC
    max_delay_ms: float = 2.0
    publisher: str = ""
    tenant: str = ""
    isolation: str = ""
    run_timeout_s: float = 0.0
    platform: str = "onnxruntime_onnx"
    trusted: bool = False
    """The pusher may push programs."""
    config: dict[str, Any] = {}
    """A merge patch of the model's configuration, made when the version is."""
    version: int = 0
    """The number it is to have, which must be the next one; 0: whatever that is."""
    about: dict[str, Any] = {}
    """A merge patch of the version's labels and note."""
    sealed: SealedDigests | None = None
    open: bool = False
    """To be stored in the clear although the model is encrypted."""
    admin: bool = False
    """The pusher may push to every tenant's models."""


class PushAnswer(msgspec.Struct, frozen=True):
    """The version a push made; ``created`` is False when the newest version already was exactly this."""

    manifest: Manifest
    created: bool
    aliases: dict[str, int]
    """Every alias of the model and the version it names."""


class Share(msgspec.Struct, frozen=True):
    """One version's part of an alias's traffic; weights count relative to one another."""

    version: int
    weight: float


class Move(msgspec.Struct, frozen=True):
    """What an alias stood for until ``moved_at`` (UTC seconds)."""

    version: int
    moved_at: float
    split: tuple[Share, ...] = ()
    sticky: bool = False


class Alias(msgspec.Struct, frozen=True):
    """A movable name for a version, or for several that share its traffic.

    ``previous`` is its history, newest first; ``revision`` counts its moves. With a ``split`` each request gets one of
    its versions by weight; the same ``x-tether-sticky`` header always gets the same one, and with ``sticky`` so does the
    same API key. ``version`` is then the one with the most weight.
    """

    model: str
    name: str
    version: int
    previous: tuple[Move, ...] = ()
    revision: int = 1
    split: tuple[Share, ...] = ()
    sticky: bool = False
    undone: tuple[Move, ...] = ()
    """What was rolled back since it was last set, newest first."""

    @property
    def versions(self) -> frozenset[int]:
        """Every version that it can stand for."""
        return frozenset({self.version, *(share.version for share in self.split)})


class Change(StrEnum):
    """What a model store is asked to do with a model's versions and aliases."""

    SET_ALIAS = "set_alias"
    DELETE_ALIAS = "delete_alias"
    ROLLBACK = "rollback"
    DELETE_VERSION = "delete_version"
    SHOW_STORE = "show_store"
    COLLECT = "collect"
    SCRUB = "scrub"
    ENCRYPT = "encrypt"
    REKEY = "rekey"
    SHOW_OWNER = "show_owner"
    GRANT = "grant"
    HAND_OVER = "hand_over"


STORE_CHANGES = frozenset({Change.SHOW_STORE, Change.COLLECT, Change.SCRUB})
"""Those that are about the store of pieces, and no model."""

OWNER_CHANGES = frozenset({Change.SHOW_OWNER, Change.GRANT, Change.HAND_OVER})
"""Those that are about who may do what with a model; they are answered with its ownership."""


class ChangeRequest(msgspec.Struct, frozen=True):
    """Gateway to model store: change a model. Which fields count follows from ``change``.

    ``by`` is the API key that asked, ``tenant`` its tenant, ``admin`` whether it may change every tenant's models.
    ``grantee`` gets the right whose number is ``right`` (0: none), or becomes the owner.
    """

    change: Change
    model: str
    alias: str = ""
    version: int = 0
    split: tuple[Share, ...] = ()
    sticky: bool = False
    by: str = ""
    tenant: str = ""
    admin: bool = False
    grantee: str = ""
    right: int = 0


class DamagedPiece(msgspec.Struct, frozen=True):
    """A piece that is missing or altered, and the versions (``model:version``) that name it."""

    digest: str
    versions: tuple[str, ...]


class StoreState(msgspec.Struct, frozen=True):
    """The store of pieces: what is in it, what no version names, and what is damaged.

    ``stored_bytes`` is what the broker keeps on its disk, ``named_bytes`` the bytes of the pieces that versions name,
    before they were compressed.
    """

    pieces: int
    stored_bytes: int
    named_pieces: int
    named_bytes: int
    unreferenced_pieces: int
    damaged: tuple[DamagedPiece, ...] = ()


class ChangeAnswer(msgspec.Struct, frozen=True):
    """The alias as it is now; None when it, or a version, is gone. What else there is, when it was asked for."""

    alias: Alias | None = None
    store: StoreState | None = None
    key_generation: int = 0


LATEST = "latest"
"""The alias that follows every push."""


def check_name(name: str, *, field: str) -> str:
    """Return ``name`` when a client may choose it.

    Raises:
        BadName: with the rule that it breaks.
    """
    if _NAME.fullmatch(name) is None:
        shown = name[:64].encode("ascii", "backslashreplace").decode()
        raise BadName(f"{field} {shown!r} does not match {NAME_PATTERN}", field=field)
    return name


MOST_RUNS = 4096
"""Runs that one request may be cut into."""


def check_inputs(manifest: Manifest, inputs: tuple[Tensor, ...], *, run_rows: int) -> None:
    """Compare a request's tensors with the version's signature. ``run_rows``: rows of one run; they must have as many rows as one
    another then, and not more than fit into ``MOST_RUNS``. 0: it is not batched.

    Raises:
        BadTensor: naming the tensor, what was sent and what is expected.
    """
    specs = {spec.name: spec for spec in manifest.inputs}
    rows = -1
    for tensor in inputs:
        spec = specs.pop(tensor.name, None)
        if spec is None:
            raise _unexpected(manifest, inputs, tensor)
        _check_against(spec, tensor)
        if run_rows:
            rows = _same_rows(tensor, rows)
    if specs:
        missing = next(iter(specs))
        raise BadTensor(f"input '{missing}' is required by model '{manifest.name}' and missing", field=missing)
    if rows > run_rows * MOST_RUNS:
        raise BadTensor(
            f"the inputs have {rows} rows; model '{manifest.name}' takes at most {run_rows * MOST_RUNS} in one request, "
            f"which are {MOST_RUNS} runs of {run_rows}: send several requests",
            field="inputs",
        )


def _same_rows(tensor: Tensor, rows: int) -> int:
    own = tensor.shape[0]
    if rows not in (-1, own):
        raise BadTensor(
            f"input '{tensor.name}' has {own} rows and another input has {rows}; all inputs need the same first axis",
            field=f"{tensor.name}.shape",
        )
    return own


def _unexpected(manifest: Manifest, inputs: tuple[Tensor, ...], tensor: Tensor) -> BadTensor:
    if sum(other.name == tensor.name for other in inputs) > 1:
        return BadTensor(f"input '{tensor.name}' is given twice", field=tensor.name)
    known = ", ".join(f"'{spec.name}'" for spec in manifest.inputs)
    shown = tensor.name[:64]
    return BadTensor(f"model '{manifest.name}' has no input '{shown}'; its inputs are {known}", field=shown)


def _check_against(spec: TensorSpec, tensor: Tensor) -> None:
    if tensor.datatype != spec.datatype:
        raise BadTensor(
            f"input '{spec.name}' has datatype {tensor.datatype[:32]}; the model expects {spec.datatype}",
            field=f"{spec.name}.datatype",
        )
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise BadTensor(
            f"input '{spec.name}' has shape {list(tensor.shape)}; the model expects {list(spec.shape)}",
            field=f"{spec.name}.shape",
        )


def check_outputs(manifest: Manifest, names: tuple[str, ...]) -> None:
    """Prove that every requested output is one of the model's, and asked for once.

    Raises:
        BadTensor: naming the first that is not.
    """
    known = {spec.name for spec in manifest.outputs}
    if len(set(names)) != len(names):
        raise BadTensor("an output is asked for twice", field="outputs")
    for name in names:
        if name not in known:
            listed = ", ".join(f"'{output}'" for output in sorted(known))
            raise BadTensor(
                f"model '{manifest.name}' has no output '{name[:64]}'; its outputs are {listed}", field="outputs"
            )


def metadata(manifest: Manifest, versions: tuple[int, ...]) -> dict[str, Any]:
    """The OIP model metadata object."""
    return {
        "name": manifest.name,
        "versions": [str(version) for version in versions],
        "platform": manifest.platform,
        "inputs": [msgspec.to_builtins(spec) for spec in manifest.inputs],
        "outputs": [msgspec.to_builtins(spec) for spec in manifest.outputs],
    }
