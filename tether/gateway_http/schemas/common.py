"""HTTP bodies, as the OpenAPI document shows them. Field names and their order are the interface."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tether.domain.job import JobState, Parameter, Priority

# Open Inference Protocol


class Tensor(Struct, omit_defaults=True):
    """A tensor: `data` is flat or nested as `shape`, or in the binary part if `binary_data_size` is given."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] | UnsetType = UNSET
    data: Any = UNSET


class WantedOutput(Struct, omit_defaults=True):
    """A requested output. Parameters: `binary_data` (bool), `classification` (number of best classes to
    return)."""

    name: str
    parameters: dict[str, Parameter] | UnsetType = UNSET


class InferBody(Struct, omit_defaults=True):
    """An inference request. Parameters: `binary_data_output` (bool), `timeout` (microseconds)."""

    inputs: list[Tensor]
    id: str | UnsetType = UNSET
    parameters: dict[str, Parameter] | UnsetType = UNSET
    outputs: list[WantedOutput] | UnsetType = UNSET


class InferAnswer(Struct, omit_defaults=True):
    """An inference response; `id` is the request's, if it had one."""

    model_name: str
    model_version: str
    outputs: list[Tensor]
    id: str | UnsetType = UNSET


class ServerMetadata(Struct):
    """The server and its supported protocol extensions."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(Struct):
    """Whether the process answers."""

    live: bool


class ServerReady(Struct):
    """Whether the process answers, and whether its dependencies work."""

    live: bool
    ready: bool


class TensorSpec(Struct, omit_defaults=True):
    """An input or output of a model; -1 is an axis of any length. `axes` are the model's names of such axes,
    empty for unnamed ones: axes of inputs with the same name must have the same length. A request may omit an
    `optional` input."""

    name: str
    datatype: str
    shape: list[int]
    axes: list[str] = []
    optional: bool = False


class ModelMetadata(Struct):
    """A model's versions, and the signature of the requested one."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelReady(Struct):
    """Whether a worker hosts the version now."""

    name: str
    ready: bool


class IndexBody(Struct):
    """Which versions to list: all, or only those that are ready."""

    ready: bool = False


class IndexEntry(Struct):
    """One version. `state` is READY, UNLOADING (some workers still host it) or UNAVAILABLE; `reason` says why
    it is not READY."""

    name: str
    version: str
    state: str
    reason: str


# the simple route


class InferenceBody(Struct, rename="camel", omit_defaults=True):
    """`inputData`: an object of nested lists by input name, one nested list for a model with one input, or
    tensors."""

    model_id: str = ""
    input_data: msgspec.Raw | UnsetType = UNSET
    version: str | int | None = None
    parameters: dict[str, Parameter] = {}


class InferenceAnswer(Struct, rename="camel"):
    """`output`: nested lists by output name."""

    model_id: str
    version: str
    output: dict[str, Any]


# jobs


class JobName(Struct):
    """An output by its name."""

    name: str


class NewJob(Struct, omit_defaults=True):
    """A durable job; `deadline_ms` counts from now."""

    model: str
    inputs: list[Tensor]
    version: str | int | UnsetType = UNSET
    outputs: list[JobName] | UnsetType = UNSET
    priority: Priority | None = None
    deadline_ms: Annotated[float, Meta(gt=0)] | UnsetType = UNSET


class NewJobs(Struct):
    """1 to 1000 durable jobs, accepted together."""

    jobs: Annotated[list[NewJob], Meta(min_length=1, max_length=1000)]


class JobError(Struct):
    """Why a job failed."""

    code: str
    message: str


class Job(Struct, omit_defaults=True):
    """A durable job; times are RFC 3339 in UTC. `result_left_out`: its result did not fit into a response
    about several jobs; request the job alone."""

    id: str
    state: JobState
    model: str
    version: str
    priority: Priority
    attempts: int
    submitted_at: str
    started_at: str | UnsetType = UNSET
    finished_at: str | UnsetType = UNSET
    result: InferAnswer | UnsetType = UNSET
    result_left_out: bool | UnsetType = UNSET
    error: JobError | UnsetType = UNSET


class Jobs(Struct, omit_defaults=True):
    """Jobs, newest first or in the order of the requested ids; `next_cursor` is present if there are more."""

    jobs: list[Job]
    next_cursor: str | UnsetType = UNSET


# models


RightName = Literal["use", "write", "own"]
"""Right of the caller's tenant to a model; an administrator has all rights of the owner."""


class ModelSummary(Struct):
    """A model; platform, size (bytes), labels and creation time are those of its newest version. `loaded` is
    false if it was unloaded explicitly. `right`: `use`, `write`, or `own` for all rights of its owner.
    `untried`: why no trial run of the newest version succeeded at its push, empty if one did."""

    name: str
    versions: list[int]
    aliases: dict[str, int]
    ready: bool
    platform: str
    size: int
    created_at: str
    loaded: bool = True
    labels: dict[str, str] = {}
    right: RightName = "use"
    untried: str = ""


class Models(Struct):
    """Every model, by name."""

    models: list[ModelSummary]


class StoredFile(Struct):
    """A file of a version; `digest` is its SHA-256 in hex, empty for callers who may not read the model's
    files."""

    path: str
    size: int
    digest: str


class Batching(Struct):
    """Batching of a version. `max_batch_size`: rows of one run, 0 if not batched; larger requests are split.
    `basis`: `proven` from the graph or `declared` by the publisher. `reason`: why it is not batched, or for a
    declared version the objection of its trial run."""

    max_batch_size: int
    max_delay_ms: float
    basis: str
    reason: str


class VersionDetail(Struct):
    """One immutable version. `workers`: how many host it now; `reason`: why fewer than configured; `served`:
    the version policy serves it. `key_generation`: the data key of an `encrypted` version. `isolation`:
    `thread` of the worker or `process` of its own; `isolation_reason`: how a run of it crashed a worker,
    after which it runs in its own process. `untried`: why no trial run succeeded at the push, empty if one
    did. `signature`: the served one of its file's `signatures`."""

    version: int
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    max_batch_size: int
    max_delay_ms: float
    batching: Batching
    files: list[StoredFile]
    size: int
    created_at: str
    publisher: str
    workers: int
    ready: bool
    reason: str
    served: bool = True
    labels: dict[str, str] = {}
    note: str = ""
    encrypted: bool = False
    key_generation: int = 0
    isolation: str = ""
    isolation_reason: str = ""
    untried: str = ""
    signature: str = ""
    signatures: list[str] = []


class ModelDetail(Struct):
    """A model with all of its versions, oldest first; `loaded` is false if it was unloaded explicitly.
    `right` as in the list of models."""

    name: str
    aliases: dict[str, int]
    versions: list[VersionDetail]
    loaded: bool = True
    right: RightName = "use"


class PushedVersion(Struct):
    """The version that a push created; `stored_bytes` of its `size` were stored by this request. `digest` is
    the SHA-256 of the only file, empty if there are several. `untried`: why no trial run succeeded, empty if
    one did. `signature`: the served one of its file's `signatures`."""

    name: str
    version: int
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    size: int
    digest: str
    stored_bytes: int
    aliases: dict[str, int]
    encrypted: bool
    batching: Batching
    untried: str = ""
    signature: str = ""
    signatures: list[str] = []


# workers


class HeldModel(Struct):
    """A version that a worker hosts."""

    model: str
    version: int


class FailedModel(Struct):
    """A version that a worker failed to load, and why."""

    model: str
    version: int
    reason: str


class Worker(Struct):
    """A worker by its last heartbeat, `age_s` seconds ago. `memory_bytes`: its limit for model files; 0: no
    limit."""

    name: str
    region: str
    ready: list[HeldModel]
    failed: list[FailedModel]
    running: int
    slots: int
    age_s: float
    labels: dict[str, str]
    memory_bytes: int


class Workers(Struct):
    """Every worker, by name."""

    workers: list[Worker]


class Readiness(Struct):
    """The gateway's dependencies: `ok`, or the problem."""

    ready: bool
    checks: dict[str, str]
