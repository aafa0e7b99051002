"""Triton's model configuration as JSON, with numbers as in its protocol buffers."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType


class ConfigTensor(Struct):
    """An input or output in Triton's terms; `dims` are without the batch axis when `max_batch_size` is above 0."""

    name: str
    data_type: str
    dims: list[int]


class TritonQueuePolicy(Struct):
    """Limits of waiting time and queue length; `timeout_action` is REJECT or DELAY."""

    timeout_action: str = "REJECT"
    default_timeout_microseconds: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


class DynamicBatching(Struct, omit_defaults=True):
    """Maximum wait of a request for a fuller batch, and the batch sizes that are sent without waiting."""

    max_queue_delay_microseconds: int = 0
    preferred_batch_size: list[int] = []
    default_queue_policy: TritonQueuePolicy | UnsetType = UNSET


class InstanceGroup(Struct):
    """Number of instances in a worker and their device: KIND_AUTO, KIND_CPU or KIND_GPU."""

    name: str = ""
    count: int = 1
    kind: str = "KIND_AUTO"


class LatestVersions(Struct):
    """The newest versions, `num_versions` of them."""

    num_versions: int = 1


class SpecificVersions(Struct):
    """Versions by number."""

    versions: list[int] = []


class AllVersions(Struct):
    """Every version."""


class TritonVersionPolicy(Struct, omit_defaults=True):
    """The served versions; exactly one field is set."""

    latest: LatestVersions | UnsetType = UNSET
    all: AllVersions | UnsetType = UNSET
    specific: SpecificVersions | UnsetType = UNSET


class TritonCache(Struct):
    """Whether outputs are cached."""

    enable: bool = False


class WarmupInput(Struct, omit_defaults=True):
    """Data for one input in a warm-up run."""

    data_type: str
    dims: list[int]
    zero_data: bool = False
    random_data: bool = False


class TritonWarmup(Struct):
    """Warm-up runs before a version is ready."""

    name: str = ""
    batch_size: int = 0
    count: int = 1
    inputs: dict[str, WarmupInput] = {}


class TritonConfig(Struct, omit_defaults=True):
    """Triton's model configuration, as far as it applies."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    default_model_filename: str
    version_policy: TritonVersionPolicy | UnsetType = UNSET
    instance_group: list[InstanceGroup] = []
    dynamic_batching: DynamicBatching | UnsetType = UNSET
    response_cache: TritonCache | UnsetType = UNSET
    model_warmup: list[TritonWarmup] = []


class RepositoryBody(Struct):
    """Parameters of `load` and `unload`. `config`: JSON of a configuration in Triton's format, applied before
    the model is loaded; `unload_dependents` has no effect; files (`file:...`) must be pushed instead."""

    parameters: dict[str, str | bool | int | float] = {}


class LoadedVersion(Struct):
    """The affected version, and its state as in the index."""

    name: str
    version: str
    state: str
