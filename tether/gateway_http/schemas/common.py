"""What HTTP bodies hold, as the OpenAPI document shows it. Field names and their order are the interface."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tether.domain.job import JobState, Parameter, Priority

# Open Inference Protocol


class Tensor(Struct, omit_defaults=True):
    """A tensor: `data` flat or nested as `shape`, or in the binary part when `binary_data_size` is given."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] | UnsetType = UNSET
    data: Any = UNSET


class WantedOutput(Struct, omit_defaults=True):
    """An output to answer. Parameters: `binary_data` (bool), `classification` (how many of the best classes)."""

    name: str
    parameters: dict[str, Parameter] | UnsetType = UNSET


class InferBody(Struct, omit_defaults=True):
    """An inference request. Parameters: `binary_data_output` (bool), `timeout` (microseconds)."""

    inputs: list[Tensor]
    id: str | UnsetType = UNSET
    parameters: dict[str, Parameter] | UnsetType = UNSET
    outputs: list[WantedOutput] | UnsetType = UNSET


class InferAnswer(Struct, omit_defaults=True):
    """An inference answer; `id` is the request's, when it had one."""

    model_name: str
    model_version: str
    outputs: list[Tensor]
    id: str | UnsetType = UNSET


class ServerMetadata(Struct):
    """The server and the protocol extensions it speaks."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(Struct):
    """The process answers."""

    live: bool


class ServerReady(Struct):
    """The process answers, and can do its work."""

    live: bool
    ready: bool


class TensorSpec(Struct, omit_defaults=True):
    """An input or output of a model; -1 is an axis of any length. `axes` are the names that the model gives to such axes, empty
    where it gives none: axes of inputs with one name have one length. A request may leave out an `optional` input."""

    name: str
    datatype: str
    shape: list[int]
    axes: list[str] = []
    optional: bool = False


class ModelMetadata(Struct):
    """A model's versions, and the signature of the one asked for."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelReady(Struct):
    """Whether a worker answers for the version just now."""

    name: str
    ready: bool


class IndexBody(Struct):
    """Which versions to list: all, or those that are ready."""

    ready: bool = False


class IndexEntry(Struct):
    """One version. `state` is READY, UNLOADING (workers still let go of it) or UNAVAILABLE, and `reason` says why it is not
    the first."""

    name: str
    version: str
    state: str
    reason: str


# the simple route


class InferenceBody(Struct, rename="camel", omit_defaults=True):
    """`inputData`: an object of input name and nested list, one nested list for a model with one input, or tensors."""

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
    """Why a job did not succeed."""

    code: str
    message: str


class Job(Struct, omit_defaults=True):
    """A durable job; times are RFC 3339, UTC. `result_left_out`: the answer about many jobs has no room for its result, ask for it
    alone."""

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
    """Jobs, newest first or in the order of the ids asked for; `next_cursor` is there when there are more."""

    jobs: list[Job]
    next_cursor: str | UnsetType = UNSET


# models


RightName = Literal["use", "write", "own"]
"""What the caller's tenant may do with a model; an administrator may do what the owner may."""


class ModelSummary(Struct):
    """A model; platform, size (bytes), labels and creation time are those of its newest version. `loaded` is false when it was
    unloaded on purpose. `right` is what this caller may do with it: `use` it, `write` to it, or all that its owner may. `untried`: why
    no trial run of the newest version succeeded at its push, empty when one did."""

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
    """A file of a version; `digest` is its SHA-256 in hex, and empty for who may use the model and not read its files."""

    path: str
    size: int
    digest: str


class Batching(Struct):
    """How requests for a version are joined. `max_batch_size`: rows of one run, 0 when it is not batched; a request with
    more is cut. `basis`: `proven` from the graph or `declared` by the publisher. `reason`: why it is not batched; of a declared
    version, what its trial run said against it."""

    max_batch_size: int
    max_delay_ms: float
    basis: str
    reason: str


class VersionDetail(Struct):
    """One immutable version. `workers`: how many answer for it just now; `reason`: why fewer than its configuration asks
    for; `served`: the version policy serves it. `key_generation`: which of the model's data keys an `encrypted` one is
    stored under. `isolation`: where it runs, `thread` (of the worker) or `process` (of its own); `isolation_reason`: how a run of it
    ended a worker, after which it runs in a process of its own. `untried`: why no trial run succeeded at the push, empty when one did.
    `signature`: the one of its file's `signatures` that is served."""

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
    """A model with all of its versions, oldest first; `loaded` is false when it was unloaded on purpose. `right` as in a
    list of models."""

    name: str
    aliases: dict[str, int]
    versions: list[VersionDetail]
    loaded: bool = True
    right: RightName = "use"


class PushedVersion(Struct):
    """The version a push made; `stored_bytes` of its `size` were stored by this request. `digest` is the SHA-256 of the
    only file, empty when there are several. `untried`: why no trial run succeeded, empty when one did. `signature`: the one of its
    file's `signatures` that is served."""

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
    """A version that a worker answers for."""

    model: str
    version: int


class FailedModel(Struct):
    """A version that a worker could not load, and why."""

    model: str
    version: int
    reason: str


class Worker(Struct):
    """A worker as its last heartbeat told; `age_s` is how many seconds ago that was. `memory_bytes`: of files of models, 0
    as many as come."""

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
    """What the gateway depends on: `ok`, or what is wrong with it."""

    ready: bool
    checks: dict[str, str]
