"""Models, versions, manifests, routes: frozen values without I/O."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec

from tether.domain.signature import TensorSpec as TensorSpec  # noqa: PLC0414 - handed on
from tether.domain.signature import check_inputs as check_inputs  # noqa: PLC0414 - handed on
from tether.domain.signature import check_outputs as check_outputs  # noqa: PLC0414 - handed on
from tether.domain.signature import gives_optional as gives_optional  # noqa: PLC0414 - handed on
from tether.domain.signature import metadata as metadata  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import NO_FINDING as NO_FINDING  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Assignment as Assignment  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Epoch as Epoch  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Finding as Finding  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Heartbeat as Heartbeat  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import ModelRef as ModelRef  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Registration as Registration  # noqa: PLC0414 - handed on
from tether.domain.worker_protocol import Route as Route  # noqa: PLC0414 - handed on
from tether.errors import BadName

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NAME_RULE = "a name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit"


FIXED_CHUNK = 1 << 20
"""Chunk size in bytes, except the last, of files that were not cut by content."""


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a version. ``chunks`` are the SHA-256 digests (hex) of its chunks in order, ``sizes`` their
    bytes.

    Older versions have no ``sizes``, and chunks of ``FIXED_CHUNK`` bytes.
    """

    path: str
    size: int
    digest: str
    chunks: tuple[str, ...]
    sizes: tuple[int, ...] = ()

    def sized_chunks(self) -> list[tuple[str, int]]:
        """Return digest and bytes of every chunk, in order."""
        if self.sizes:
            return list(zip(self.chunks, self.sizes, strict=True))
        left = range(self.size, 0, -FIXED_CHUNK)
        return [(digest, min(FIXED_CHUNK, rest)) for digest, rest in zip(self.chunks, left, strict=True)]


class SealedDigests(msgspec.Struct, frozen=True):
    """The plain digests of an encrypted version's files and chunks, encrypted with the data key ``key_id``."""

    key_id: bytes
    box: bytes


PROVEN = "proven"
DECLARED = "declared"


class Batching(msgspec.Struct, frozen=True):
    """Batching of a version: rows per run, and the maximum wait for more requests."""

    max_batch_size: int = 0
    """0: not batched, every job runs alone."""
    max_delay_ms: float = 2.0
    basis: str = ""
    """Why rows of different callers may share a run: ``proven`` from the graph or ``declared`` by the
    publisher. Empty if not batched, and in older manifests."""
    reason: str = ""
    """Why it is not batched, in one line; for a declared version, the objection of its trial run."""


class Isolation(StrEnum):
    """Where a model runs: in a thread of the worker, or in its own process."""

    THREAD = "thread"
    PROCESS = "process"


class Manifest(msgspec.Struct, frozen=True):
    """The description of an immutable version, which exists once its signed manifest does.

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
    """Tenant whose key pushed it and whose quota its bytes count towards; empty if none."""
    isolation: str = ""
    """Empty: the platform's default, see :func:`isolation_of`."""
    run_timeout_s: float = 0.0
    """0: the worker's setting."""
    sealed: SealedDigests | None = None
    """Set for an encrypted version, whose digests in ``files`` are keyed with its data key."""
    partition: int = 0
    """Partition of its chunks; older versions are in the first."""
    owner: str = ""
    """The owner of the model when the version was made; empty in older versions. The current owner is in its
    :class:`~tether.model.ownership.Ownership`."""
    untried: str = ""
    """Why no trial run succeeded at the push, in one line; empty if one did."""
    signature: str = ""
    """The served signature of its file, for formats that have several."""
    signatures: tuple[str, ...] = ()
    """All signatures of its file."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def isolation_of(manifest: Manifest) -> Isolation:
    """Return where a version runs; default: ONNX in the worker's process, all others in their own."""
    if manifest.isolation:
        return Isolation(manifest.isolation)
    return Isolation.THREAD if manifest.platform == "onnxruntime_onnx" else Isolation.PROCESS


AUTOMATIC = -1
"""As ``max_batch_size`` of a push: derive it from the model."""


class PushRequest(msgspec.Struct, frozen=True):
    """Gateway to model store: make a version of ``name`` from stored files. ``publisher`` is the pusher."""

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
    """The pusher may push models that contain code."""
    config: dict[str, Any] = {}
    """A merge patch of the model's configuration, applied with the version."""
    version: int = 0
    """The expected number, which must be the next one; 0: any."""
    about: dict[str, Any] = {}
    """A merge patch of the version's labels and note."""
    sealed: SealedDigests | None = None
    open: bool = False
    """Store in plaintext although the model is encrypted."""
    admin: bool = False
    """The pusher may push to every tenant's models."""
    signature: str = ""
    """The signature of its file to serve; empty: the default one."""


class PushAnswer(msgspec.Struct, frozen=True):
    """The version that a push made; ``created`` is False if the newest version is identical."""

    manifest: Manifest
    created: bool
    aliases: dict[str, int]
    """Every alias of the model with its version."""


class Share(msgspec.Struct, frozen=True):
    """One version's share of an alias's traffic; weights are relative to one another."""

    version: int
    weight: float


class Move(msgspec.Struct, frozen=True):
    """An earlier target of an alias, until ``moved_at`` (UTC seconds)."""

    version: int
    moved_at: float
    split: tuple[Share, ...] = ()
    sticky: bool = False


class Alias(msgspec.Struct, frozen=True):
    """A movable name for a version, or for several that share its traffic.

    ``previous`` is its history, newest first; ``revision`` counts its moves. With a ``split`` each request
    gets one of its versions by weight; requests with the same ``x-tether-sticky`` header get the same one,
    and with ``sticky`` so do those with the same API key. ``version`` is then the one with the largest
    weight.
    """

    model: str
    name: str
    version: int
    previous: tuple[Move, ...] = ()
    revision: int = 1
    split: tuple[Share, ...] = ()
    sticky: bool = False
    undone: tuple[Move, ...] = ()
    """Targets that were rolled back since it was last set, newest first."""

    @property
    def versions(self) -> frozenset[int]:
        """All versions that it can point at."""
        return frozenset({self.version, *(share.version for share in self.split)})


class Change(StrEnum):
    """Commands to a model store about a model's versions, aliases, keys and owner, or about its chunks."""

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
"""Commands about the chunk store rather than a model."""

OWNER_CHANGES = frozenset({Change.SHOW_OWNER, Change.GRANT, Change.HAND_OVER})
"""Commands about ownership and grants; the reply is the ownership."""


class ChangeRequest(msgspec.Struct, frozen=True):
    """Gateway to model store: change a model. The used fields depend on ``change``.

    ``by`` is the requesting API key, ``tenant`` its tenant, ``admin`` whether it may change every tenant's
    models. ``grantee`` gets the right with the number ``right`` (0: none), or becomes the owner.
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


class DamagedChunk(msgspec.Struct, frozen=True):
    """A missing or altered chunk, and the versions (``model:version``) that reference it."""

    digest: str
    versions: tuple[str, ...]


class StoreState(msgspec.Struct, frozen=True):
    """State of the chunk store: its contents, unreferenced and damaged chunks.

    ``stored_bytes`` is the broker's disk use, ``named_bytes`` the uncompressed bytes of referenced chunks.
    """

    chunks: int
    stored_bytes: int
    named_chunks: int
    named_bytes: int
    unreferenced_chunks: int
    damaged: tuple[DamagedChunk, ...] = ()


class ChangeAnswer(msgspec.Struct, frozen=True):
    """The resulting alias, or None if it, or a version, was deleted; other fields if requested."""

    alias: Alias | None = None
    store: StoreState | None = None
    key_generation: int = 0


LATEST = "latest"
"""The alias that follows every push."""


def check_name(name: str, *, field: str) -> str:
    """Return ``name`` if a client may choose it.

    Raises:
        BadName: with the violated rule.
    """
    if _NAME.fullmatch(name) is None:
        shown = name[:64].encode("ascii", "backslashreplace").decode()
        raise BadName(f"{field} {shown!r} is not allowed; {_NAME_RULE}", field=field)
    return name
