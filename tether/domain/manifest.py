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
_NAME_RULE = "a name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit"


FIXED_CHUNK = 1 << 20
"""Bytes of every chunk but the last in files that were not cut by their content."""


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a version. ``chunks`` are the SHA-256 digests (hex) of its chunks, in order, ``sizes`` their bytes.

    Versions from before there were ``sizes`` have none, and chunks of ``FIXED_CHUNK`` bytes.
    """

    path: str
    size: int
    digest: str
    chunks: tuple[str, ...]
    sizes: tuple[int, ...] = ()

    def sized_chunks(self) -> list[tuple[str, int]]:
        """Digest and bytes of every chunk, in order."""
        if self.sizes:
            return list(zip(self.chunks, self.sizes, strict=True))
        left = range(self.size, 0, -FIXED_CHUNK)
        return [(digest, min(FIXED_CHUNK, rest)) for digest, rest in zip(self.chunks, left, strict=True)]


class SealedDigests(msgspec.Struct, frozen=True):
    """What an encrypted version's files and chunks really are: the plain digests, closed with the data key ``key_id``."""

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
    """Where its chunks are; versions from before there were several are in the first."""
    owner: str = ""
    """The tenant that owned the model when the version was made; empty in versions from before models had owners. Who
    owns it now, its :class:`~tether.model.ownership.Ownership` says."""
    untried: str = ""
    """Why no trial run succeeded at the push, in one line; empty when one did."""
    signature: str = ""
    """The signature of its file that is served, for formats that have several."""
    signatures: tuple[str, ...] = ()
    """All that its file has."""

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
    signature: str = ""
    """Which signature of its file is to be served; empty: the usual one."""


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
"""Those that are about the store of chunks, and no model."""

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


class DamagedChunk(msgspec.Struct, frozen=True):
    """A chunk that is missing or altered, and the versions (``model:version``) that name it."""

    digest: str
    versions: tuple[str, ...]


class StoreState(msgspec.Struct, frozen=True):
    """The store of chunks: what is in it, what no version names, and what is damaged.

    ``stored_bytes`` is what the broker keeps on its disk, ``named_bytes`` the bytes of the chunks that versions name,
    before they were compressed.
    """

    chunks: int
    stored_bytes: int
    named_chunks: int
    named_bytes: int
    unreferenced_chunks: int
    damaged: tuple[DamagedChunk, ...] = ()


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
        raise BadName(f"{field} {shown!r} is not allowed; {_NAME_RULE}", field=field)
    return name
