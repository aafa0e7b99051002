"""Triton's model configuration in JSON: its names, and numbers where its protocol buffers have them."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType


class ConfigTensor(Struct):
    """An input or output in Triton's terms; `dims` are without the batch axis when `max_batch_size` is above 0."""

    name: str
    data_type: str
    dims: list[int]


class TritonQueuePolicy(Struct):
    """How long requests may wait, and how many; `timeout_action` is REJECT or DELAY."""

    timeout_action: str = "REJECT"
    default_timeout_microseconds: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


class DynamicBatching(Struct, omit_defaults=True):
    """How long a request may wait for company, and the sizes at which it does not."""

    max_queue_delay_microseconds: int = 0
    preferred_batch_size: list[int] = []
    default_queue_policy: TritonQueuePolicy | UnsetType = UNSET


class InstanceGroup(Struct):
    """How many instances a worker runs, and on what: KIND_AUTO, KIND_CPU or KIND_GPU."""

    name: str = ""
    count: int = 1
    kind: str = "KIND_AUTO"


class LatestVersions(Struct):
    """So many of the newest versions."""

    num_versions: int = 1


class SpecificVersions(Struct):
    """Versions by number."""

    versions: list[int] = []


class AllVersions(Struct):
    """Every version."""


class TritonVersionPolicy(Struct, omit_defaults=True):
    """Which versions are served; one of the three is set."""

    latest: LatestVersions | UnsetType = UNSET
    all: AllVersions | UnsetType = UNSET
    specific: SpecificVersions | UnsetType = UNSET


class TritonCache(Struct):
    """Whether answers are kept."""

    enable: bool = False


class WarmupInput(Struct, omit_defaults=True):
    """What a warm-up run gives to one input."""

    data_type: str
    dims: list[int]
    zero_data: bool = False
    random_data: bool = False


class TritonWarmup(Struct):
    """Runs before a version is ready."""

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
    """What `load` and `unload` are asked with. `config`: JSON of a configuration in Triton's form, whose fields are changed
    before the model is loaded; `unload_dependents` has nothing to act on; files (`file:...`) are pushed instead."""

    parameters: dict[str, str | bool | int | float] = {}


class LoadedVersion(Struct):
    """A version that the request was about, and its state as in the index."""

    name: str
    version: str
    state: str
