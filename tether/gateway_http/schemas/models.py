"""Bodies of resumable pushes, and of aliases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

ConfigPatch = Annotated[
    dict[str, Any],
    Meta(
        description="Fields of a ModelConfig that are to change: objects are merged, everything else is replaced, null is the default."
    ),
]
"""A merge patch (RFC 7396)."""


class ConfigQuery(Struct, forbid_unknown_fields=True):
    """Query of a change of a configuration."""

    revision: Annotated[
        int, Meta(ge=-1, description="Change only this revision, and answer 409 when it is another; -1: any.")
    ] = -1


class Share(Struct, forbid_unknown_fields=True):
    """A version's part of an alias's requests; weights count relative to one another."""

    version: Annotated[int, Meta(ge=1)]
    weight: Annotated[float, Meta(gt=0, le=1_000_000)]


class WantedAlias(Struct, forbid_unknown_fields=True):
    """What an alias is to stand for: one `version`, or several that share its requests. With `sticky` an API key always
    gets the same one; a header `x-tether-sticky` does that for whatever it names. Without `force` a version that no
    worker holds is refused."""

    version: Annotated[int, Meta(ge=0)] = 0
    split: Annotated[list[Share], Meta(max_length=16)] = []
    sticky: bool = False
    force: bool = False


class WantedRollback(Struct, forbid_unknown_fields=True):
    """The alias to roll back."""

    alias: str


class AliasMove(Struct):
    """What an alias stood for until `until`."""

    version: int
    split: list[Share]
    until: str


class AliasDetail(Struct):
    """An alias: what it stands for, stood for before, and what was rolled back since; newest first."""

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
    """How far a version is on its way to the workers that the caller's requests go to. `state`: `ready` when a worker answers,
    `loading` before that; `failed` when no worker could load it, which goes on being tried; `unplaced` when none has room for it or
    its labels; `no_workers` when there are none; `unloaded` and `not_served` as the model's configuration says. `workers`: how many
    are to hold it; `ready` and `failed`: how many of them do, and could not load it. `reason`: why it is not ready."""

    name: str
    version: int
    state: RolloutState
    workers: int
    ready: int
    failed: int
    reason: str = ""


class Gone(Struct):
    """What was deleted: an alias's name or a version's number."""

    model: str
    deleted: str


class ShadowTally(Struct):
    """What became of the copies for one shadow since `since`, at the gateway that answers. Of those whose answers were compared:
    `equal`, `close` (numbers within their tolerance) and `different`; without an answer: `error`, `unavailable` (no worker holds
    the version) and `dropped` (too many were under way). `largest_difference` is of two numbers; `last_error` is a code."""

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
    """Hex SHA-256 of chunks, of a version that is to be encrypted or not; without `encrypt` it is when the model is."""

    chunks: Annotated[list[str], Meta(max_length=16384)]
    encrypt: bool | None = None


class MissingChunks(Struct):
    """Those of the chunks that the store does not have, in the order asked. `encrypt` is to be repeated with each of
    them, and when the version is made."""

    missing: list[str]
    encrypt: bool


class ChunkQuery(Struct, forbid_unknown_fields=True):
    """Query of a chunk."""

    encrypt: Annotated[bool | None, Meta(description="Store it encrypted; as the model is, when not given.")] = None


class ModelKey(Struct):
    """The data key that a model has now, by its number. `versions_left` are still stored under one before it."""

    model: str
    generation: int
    versions_left: list[int]


class StoredChunk(Struct):
    """A chunk that the store has now; `stored_bytes` is 0 when it had it before."""

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
    """Everything that a version is made of."""

    model: str
    version: int
    platform: str
    files: list[NewFile]


class NewVersion(Struct, forbid_unknown_fields=True):
    """Files whose chunks are stored, to become a version. `platform` is its format; one that is a program needs the scope
    `models:code`. `run_timeout_s` ends the process of a model whose run takes longer; 0 is the worker's setting. `config`
    changes how the model is served, before the version can be seen. With `version` it becomes that one or, where that is not the next
    one, none. `encrypt` is what it was for its chunks. `sample`: real inputs for trial runs, warm-up and the check of rows,
    `{"inputs": [tensors]}` as in an inference request or values by name; they are kept with the version. `signature`: which one of a
    SavedModel or TensorFlow Lite file is served."""

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
    """Labels are merged with those that the version has, and one that is null goes; `note` replaces what there is."""

    labels: dict[str, str | None] = {}
    note: str | None = None


class DamagedChunk(Struct):
    """A chunk that is missing or altered, and the versions (`model:version`) that name it; pushing one of them mends it."""

    digest: str
    versions: list[str]


class Store(Struct):
    """The store of chunks. `stored_bytes` is what the broker keeps on its disk, `named_bytes` the bytes of the chunks that
    versions name, before they were compressed; unreferenced chunks are kept for a while and then removed."""

    chunks: int
    stored_bytes: int
    named_chunks: int
    named_bytes: int
    unreferenced_chunks: int
    damaged: list[DamagedChunk]


class WantedGrant(Struct, forbid_unknown_fields=True):
    """What a tenant is granted in place of what it had: to `use` a model, or also to `write` to it: push, change, load,
    delete, read its files."""

    right: Literal["use", "write"]


class WantedOwner(Struct, forbid_unknown_fields=True):
    """The tenant that is to own a model. The owner before keeps no right but those that every tenant has."""

    tenant: str


class Grant(Struct):
    """What a tenant may do with another tenant's model; `*` is every tenant."""

    tenant: str
    right: Literal["use", "write"]


class Grants(Struct):
    """Who owns a model, and what others may do with it. `revision` counts the changes."""

    model: str
    owner: str
    grants: list[Grant]
    revision: int
