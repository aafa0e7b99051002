"""Bodies of pushes, aliases, grants and other model routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

ConfigPatch = Annotated[
    dict[str, Any],
    Meta(
        description="Fields of a ModelConfig to change: objects are merged, "
        "other values are replaced, null resets to the default."
    ),
]
"""A merge patch (RFC 7396)."""


class ConfigQuery(Struct, forbid_unknown_fields=True):
    """Query of a configuration change."""

    revision: Annotated[int, Meta(ge=-1, description="Expected current revision; 409 if it differs; -1: any.")] = -1


class Share(Struct, forbid_unknown_fields=True):
    """A version's share of an alias's requests; weights are relative to one another."""

    version: Annotated[int, Meta(ge=1)]
    weight: Annotated[float, Meta(gt=0, le=1_000_000)]


class WantedAlias(Struct, forbid_unknown_fields=True):
    """Target of an alias: one `version`, or several in a weighted `split`. With `sticky` an API key always
    gets the same version; a header `x-tether-sticky` does the same for its value. Without `force` a version
    that no worker hosts is rejected."""

    version: Annotated[int, Meta(ge=0)] = 0
    split: Annotated[list[Share], Meta(max_length=16)] = []
    sticky: bool = False
    force: bool = False


class WantedRollback(Struct, forbid_unknown_fields=True):
    """The alias to roll back."""

    alias: str


class AliasMove(Struct):
    """An earlier target of an alias, valid until `until`."""

    version: int
    split: list[Share]
    until: str


class AliasDetail(Struct):
    """An alias: its target, its previous targets, and those rolled back since; newest first."""

    model: str
    alias: str
    version: int
    split: list[Share]
    sticky: bool
    revision: int
    previous: list[AliasMove]
    undone: list[AliasMove]


RolloutState = Literal["loading", "ready", "failed", "unplaced", "no_workers", "unloaded", "not_served"]


class Rollout(Struct):
    """Rollout of a version to the workers of the caller's pool. `state`: `ready` if a worker hosts it,
    `loading` before that; `failed` if no worker could load it (retried); `unplaced` if no worker has room for
    it or its labels; `no_workers` if there are none; `unloaded` and `not_served` as the model's configuration
    says. `workers`: how many should host it; `ready` and `failed`: how many do, and failed to. `reason`: why
    it is not ready."""

    name: str
    version: int
    state: RolloutState
    workers: int
    ready: int
    failed: int
    reason: str = ""


class Gone(Struct):
    """A deleted alias or version, by its name or number."""

    model: str
    deleted: str


class ShadowTally(Struct):
    """Results of one shadow at this gateway since `since`. Compared: `equal`, `close` (numbers within their
    tolerance) and `different`; not compared: `error`, `unavailable` (no worker hosts the version) and
    `dropped` (too many in flight). `largest_difference` is of two numbers; `last_error` is a code."""

    version: int
    percent: float
    alias: str
    since: str
    equal: int
    close: int
    different: int
    error: int
    unavailable: int
    dropped: int
    largest_difference: float
    last_error: str


class Shadows(Struct):
    """A model's shadow versions."""

    model: str
    shadows: list[ShadowTally]


class WantedChunks(Struct, forbid_unknown_fields=True):
    """Hex SHA-256 of chunks of a version. `encrypt`: whether it will be encrypted; default: as the model is."""

    chunks: Annotated[list[str], Meta(max_length=16384)]
    encrypt: bool | None = None


class MissingChunks(Struct):
    """The subset of chunks that must be uploaded, in the requested order. Send `encrypt` with each of them,
    and when registering the version."""

    missing: list[str]
    encrypt: bool


class ChunkQuery(Struct, forbid_unknown_fields=True):
    """Query of a chunk upload."""

    encrypt: Annotated[bool | None, Meta(description="Store it encrypted; default: as the model is.")] = None


class ModelKey(Struct):
    """Number of the model's current data key. `versions_left` are still encrypted with an earlier one."""

    model: str
    generation: int
    versions_left: list[int]


class StoredChunk(Struct):
    """A stored chunk; `stored_bytes` is 0 if it was stored before."""

    digest: str
    size: int
    stored_bytes: int


class NewFile(Struct, forbid_unknown_fields=True):
    """A file of a version: `chunks` are the digests of its chunks in order, `sizes` their bytes."""

    path: str
    size: int
    digest: str
    chunks: Annotated[list[str], Meta(max_length=131072)]
    sizes: Annotated[list[int], Meta(max_length=131072)]


class VersionFiles(Struct):
    """All files of a version."""

    model: str
    version: int
    platform: str
    files: list[NewFile]


class NewVersion(Struct, forbid_unknown_fields=True):
    """Files with stored chunks, to register as a version. `platform` is their format; one that contains code
    needs the scope `models:code`. `run_timeout_s`: a longer run ends the model's process; 0: the worker's
    setting. `config` changes the model's configuration before the version becomes visible. `version`: the
    expected number; the push fails if another is next. `encrypt` must be as for its chunks. `sample`: real
    inputs for trial runs, warm-up and the row check, `{"inputs": [tensors]}` as in an inference request, or
    values by name; stored with the version. `signature`: the served signature of a SavedModel or TensorFlow
    Lite file."""

    files: Annotated[list[NewFile], Meta(min_length=1, max_length=1024)]
    max_batch_size: Annotated[int, Meta(ge=-1, le=65536)] = -1
    max_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] = 2.0
    platform: str = "onnxruntime_onnx"
    isolation: Literal["", "thread", "process"] = ""
    run_timeout_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    config: ConfigPatch = {}
    version: Annotated[int, Meta(ge=0, lt=1_000_000_000)] = 0
    labels: dict[str, str] = {}
    note: str = ""
    encrypt: bool | None = None
    sample: dict[str, Raw] = {}
    signature: Annotated[str, Meta(max_length=256)] = ""


class WantedNote(Struct, forbid_unknown_fields=True):
    """`labels` are merged with the version's, null removes one; `note` replaces the current note."""

    labels: dict[str, str | None] = {}
    note: str | None = None


class DamagedChunk(Struct):
    """A missing or altered chunk, and the versions (`model:version`) that reference it; pushing one of them
    repairs it."""

    digest: str
    versions: list[str]


class Store(Struct):
    """The chunk store. `stored_bytes`: disk use at the broker; `named_bytes`: uncompressed bytes of
    referenced chunks. Unreferenced chunks are removed after a while."""

    chunks: int
    stored_bytes: int
    named_chunks: int
    named_bytes: int
    unreferenced_chunks: int
    damaged: list[DamagedChunk]


class WantedGrant(Struct, forbid_unknown_fields=True):
    """A grant, which replaces the tenant's earlier one: `use` a model, or also `write` it: push, change,
    load, delete, read its files."""

    right: Literal["use", "write"]


class WantedOwner(Struct, forbid_unknown_fields=True):
    """The new owner of a model. The previous owner keeps only the rights that every tenant has."""

    tenant: str


class Grant(Struct):
    """The right of a tenant to another tenant's model; `*` is every tenant."""

    tenant: str
    right: Literal["use", "write"]


class Grants(Struct):
    """The owner of a model, and its grants. `revision` counts changes."""

    model: str
    owner: str
    grants: list[Grant]
    revision: int
