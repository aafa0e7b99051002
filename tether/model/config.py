"""Model configuration: set at a push or changed later, for all versions, without creating a new one.

A version's manifest is immutable; everything changeable about a model is here. An entry counts as a whole,
and the newest ``revision`` wins. The concepts are those of Triton's model configuration, under the same names
where possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

import msgspec

from tether.errors import InvalidRequest

MAX_BATCH = 65_536
MAX_DELAY_MS = 10_000.0
MAX_RUN_S = 86_400.0
COMPILED = ("pytorch_export", "pytorch_safetensors")
"""Platforms that support ``compile``: TorchScript is already compiled, and PyTorch refuses to compile it
again."""
MOST = 16
"""Maximum number of entries in any list of a configuration."""


class InstanceKind(StrEnum):
    """Device of an instance; ``auto`` uses CUDA if runtime and machine support it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Loading(StrEnum):
    """When an assigned worker loads a version: at once, or with its first job."""

    EAGER = "eager"
    LAZY = "lazy"


class TimeoutAction(StrEnum):
    """Handling of a request that waited for ``QueuePolicy.timeout_ms``: reject it, or serve it after others."""

    REJECT = "reject"
    DELAY = "delay"


class LoadBalancing(StrEnum):
    """How workers that host a version share its jobs; each takes jobs only while it has a free slot."""

    LEAST_CONNECTIONS = "least_connections"
    """Workers with more free slots request more."""
    ROUND_ROBIN = "round_robin"
    """In turn."""
    WEIGHTED_ROUND_ROBIN = "weighted_round_robin"
    """Turns in proportion to the worker's setting ``worker_weight``."""
    CAPACITY = "capacity"
    """Turns in proportion to the worker's measured capacity."""


class QueuePolicy(msgspec.Struct, frozen=True):
    """Limits of waiting time and queue length of a model's requests. 0: no limit of its own."""

    max_size: int = 0
    timeout_ms: float = 0.0
    timeout_action: TimeoutAction = TimeoutAction.REJECT
    allow_timeout_override: bool = True
    """Whether a request's own ``timeout`` may shorten it; it can never extend it."""


class Warmup(msgspec.Struct, frozen=True):
    """Warm-up runs after a load, before the version is ready: ``count`` runs of ``rows`` rows.

    ``shapes`` gives the variable axes of inputs, without the batch axis. ``random``: random values instead of
    zeros.
    """

    rows: int = 1
    count: int = 1
    shapes: Mapping[str, tuple[int, ...]] = {}
    random: bool = False


class VersionPolicy(msgspec.Struct, frozen=True):
    """Served versions: the ``latest`` so many, or ``specific`` ones; neither: all. Targets of aliases are
    always served."""

    latest: int = 0
    specific: tuple[int, ...] = ()


class Shadow(msgspec.Struct, frozen=True):
    """A version that receives ``percent`` of the requests of ``alias`` (empty: of the model), without
    answering them."""

    version: int
    percent: float = 100.0
    alias: str = ""


class ModelConfig(msgspec.Struct, frozen=True):
    """The configuration of a model. The defaults are those of a model without an entry.

    ``changed_at`` is UTC seconds. ``None``, and 0 where noted, mean the manifest's value or the worker's
    setting.
    """

    model: str
    revision: int = 0
    changed_at: float = 0.0
    changed_by: str = ""

    max_batch_size: int | None = None
    """Can only lower the version's own limit."""
    max_delay_ms: float | None = None
    preferred_batch_sizes: tuple[int, ...] = ()

    queue: QueuePolicy = QueuePolicy()
    default_priority: str = ""
    """Default priority of durable jobs: ``high``, ``normal`` or ``low``; empty: ``normal``."""

    instances: int = 1
    """Instances in one worker, which run concurrently."""
    kind: InstanceKind = InstanceKind.AUTO
    threads: int = 0
    """Threads of one instance; 0: the worker's setting."""
    compile: bool = False
    """Use ``torch.compile`` at load, for platforms in ``COMPILED``."""
    isolation: str = ""
    run_timeout_s: float = 0.0
    warmup: tuple[Warmup, ...] = ()

    loading: Loading = Loading.EAGER
    loaded: bool = True
    """False: unloaded from all workers until it is loaded again; its jobs wait or are rejected."""
    pinned: bool = False
    """Never unloaded to free memory or when idle."""
    idle_unload_s: float = 0.0
    """0: never unloaded when idle."""

    versions: VersionPolicy = VersionPolicy()
    replicas_min: int = 0
    """Workers that should host it whatever else they host; if this and ``replicas_max`` are 0: every worker
    with room."""
    replicas_max: int = 0
    labels: Mapping[str, str] = {}
    """Labels that a worker must have to host it."""

    load_balancing: LoadBalancing = LoadBalancing.LEAST_CONNECTIONS

    cache_ttl_s: float = 0.0
    """Seconds for which outputs are cached; 0: never."""
    shadows: tuple[Shadow, ...] = ()


def default_config(model: str) -> ModelConfig:
    """Return the configuration of a model without an entry."""
    return ModelConfig(model)


def check_config(config: ModelConfig) -> ModelConfig:
    """Check and return a configuration, without regard to the existing versions.

    Raises:
        InvalidRequest: naming the field and its allowed values.
    """
    _check_batching(config)
    _check_queue(config.queue)
    _check_instances(config)
    for index, warmup in enumerate(config.warmup):
        _check_warmup(f"warmup[{index}]", warmup)
    _check_placement(config)
    for index, shadow in enumerate(config.shadows):
        _between(f"shadows[{index}].version", shadow.version, 1, 1 << 31)
        _between(f"shadows[{index}].percent", shadow.percent, 0, 100)
    _between("cache_ttl_s", config.cache_ttl_s, 0, MAX_RUN_S)
    return config


def _check_batching(config: ModelConfig) -> None:
    if config.max_batch_size is not None:
        _between("max_batch_size", config.max_batch_size, 0, MAX_BATCH)
    if config.max_delay_ms is not None:
        _between("max_delay_ms", config.max_delay_ms, 0, MAX_DELAY_MS)
    _at_most("preferred_batch_sizes", config.preferred_batch_sizes)
    for size in config.preferred_batch_sizes:
        _between("preferred_batch_sizes", size, 1, MAX_BATCH if not config.max_batch_size else config.max_batch_size)


def _check_queue(queue: QueuePolicy) -> None:
    _between("queue.max_size", queue.max_size, 0, 1 << 20)
    _between("queue.timeout_ms", queue.timeout_ms, 0, MAX_RUN_S * 1000)


def _check_instances(config: ModelConfig) -> None:
    _between("instances", config.instances, 1, 64)
    _between("threads", config.threads, 0, 256)
    _between("run_timeout_s", config.run_timeout_s, 0, MAX_RUN_S)
    _one_of("isolation", config.isolation, ("", "thread", "process"))
    _one_of("default_priority", config.default_priority, ("", "high", "normal", "low"))
    _at_most("warmup", config.warmup)
    _at_most("shadows", config.shadows)


def _check_warmup(field: str, warmup: Warmup) -> None:
    _between(f"{field}.rows", warmup.rows, 1, MAX_BATCH)
    _between(f"{field}.count", warmup.count, 1, 1000)
    _at_most(f"{field}.shapes", warmup.shapes)
    for name, shape in warmup.shapes.items():
        _at_most(f"{field}.shapes.{name[:64]}", shape)
        for axis in shape:
            _between(f"{field}.shapes.{name[:64]}", axis, 1, 1 << 24)


def _check_placement(config: ModelConfig) -> None:
    _between("idle_unload_s", config.idle_unload_s, 0, 30 * 86_400)
    _between("replicas_min", config.replicas_min, 0, 1024)
    _between("replicas_max", config.replicas_max, 0, 1024)
    if config.replicas_max and config.replicas_min > config.replicas_max:
        raise InvalidRequest("replicas_min must be at most replicas_max", field="replicas_min")
    _between("versions.latest", config.versions.latest, 0, 1024)
    _at_most("versions.specific", config.versions.specific)
    for number in config.versions.specific:
        _between("versions.specific", number, 1, 1 << 31)
    if config.versions.latest and config.versions.specific:
        raise InvalidRequest("versions has both 'latest' and 'specific'; give only one", field="versions")
    _at_most("labels", config.labels)
    for name, value in config.labels.items():
        if not 0 < len(name) <= 64 or len(value) > 64 or not (name + value).isprintable():
            raise InvalidRequest("a label and its value must each have at most 64 printable characters", field="labels")


def _between(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{field} must be {low:g} to {high:g}, got {value:g}", field=field)


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f"'{choice}'" for choice in choices if choice)
        raise InvalidRequest(f"{field} must be one of {listed}", field=field)


def _at_most(field: str, values: Mapping[str, object] | tuple[object, ...]) -> None:
    if len(values) > MOST:
        raise InvalidRequest(f"{field} has {len(values)} entries; at most {MOST} are allowed", field=field)
