"""How a model is served: set at a push or changed later, for all of its versions, without making a new one.

What a version *is* stands in its manifest and never changes; what is decided about a model stands here. An entry counts as
a whole, the newest ``revision`` wins. The ideas are those of Triton's model configuration; names that mean the same are
the same.
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
"""Platforms that ``compile`` is for: TorchScript is a compiled form itself, and PyTorch refuses to compile it again."""
MOST = 16
"""Entries of any list of a configuration."""


class InstanceKind(StrEnum):
    """What an instance runs on; ``auto`` takes CUDA where the runtime and the machine have it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Loading(StrEnum):
    """When a worker that was given a version loads it: at once, or when its first job comes."""

    EAGER = "eager"
    LAZY = "lazy"


class TimeoutAction(StrEnum):
    """What happens to a request that waited for ``QueuePolicy.timeout_ms``: refused, or served after those that did not."""

    REJECT = "reject"
    DELAY = "delay"


class LoadBalancing(StrEnum):
    """How workers that hold a version share its jobs; each takes jobs only while it has a free slot."""

    LEAST_CONNECTIONS = "least_connections"
    """Who has more free slots asks for more."""
    ROUND_ROBIN = "round_robin"
    """In turn."""
    WEIGHTED_ROUND_ROBIN = "weighted_round_robin"
    """As many turns as the worker's setting ``worker_weight`` says."""
    CAPACITY = "capacity"
    """As many turns as follow from what the worker is measured to be able to do."""


class QueuePolicy(msgspec.Struct, frozen=True):
    """How long requests of a model may wait, and how many. 0: no limit of its own."""

    max_size: int = 0
    timeout_ms: float = 0.0
    timeout_action: TimeoutAction = TimeoutAction.REJECT
    allow_timeout_override: bool = True
    """Whether a request's own ``timeout`` may shorten it; none can make it longer."""


class Warmup(msgspec.Struct, frozen=True):
    """Runs made after a load, before the version counts as ready: ``count`` runs of ``rows`` rows.

    ``shapes`` gives axes that the signature leaves open, by input and without the batch axis. ``random``: values drawn
    instead of zeros.
    """

    rows: int = 1
    count: int = 1
    shapes: Mapping[str, tuple[int, ...]] = {}
    random: bool = False


class VersionPolicy(msgspec.Struct, frozen=True):
    """Which versions are served: the ``latest`` so many, or the ``specific`` ones; neither: all. What an alias stands for
    is served in any case."""

    latest: int = 0
    specific: tuple[int, ...] = ()


class Shadow(msgspec.Struct, frozen=True):
    """A version that gets a copy of ``percent`` of the requests of ``alias`` (empty: of the model) and never answers them."""

    version: int
    percent: float = 100.0
    alias: str = ""


class ModelConfig(msgspec.Struct, frozen=True):
    """Everything decided about a model. The defaults are what a model without an entry has.

    ``changed_at`` is UTC seconds. ``None``, and 0 where it says so: as the version's manifest or the worker's settings have it.
    """

    model: str
    revision: int = 0
    changed_at: float = 0.0
    changed_by: str = ""

    max_batch_size: int | None = None
    """May only lower what the version itself allows."""
    max_delay_ms: float | None = None
    preferred_batch_sizes: tuple[int, ...] = ()

    queue: QueuePolicy = QueuePolicy()
    default_priority: str = ""
    """Of durable jobs that name none: ``high``, ``normal`` or ``low``; empty: ``normal``."""

    instances: int = 1
    """Runs that one worker makes side by side, each with its own copy of the model."""
    kind: InstanceKind = InstanceKind.AUTO
    threads: int = 0
    """Of one instance; 0: the worker's setting."""
    compile: bool = False
    """``torch.compile`` at load, where a version's platform is one of ``COMPILED``."""
    isolation: str = ""
    run_timeout_s: float = 0.0
    warmup: tuple[Warmup, ...] = ()

    loading: Loading = Loading.EAGER
    loaded: bool = True
    """False: taken out of all workers until it is loaded again; its jobs wait or are refused."""
    pinned: bool = False
    """Never unloaded to make room, nor for idleness."""
    idle_unload_s: float = 0.0
    """0: not for idleness."""

    versions: VersionPolicy = VersionPolicy()
    replicas_min: int = 0
    """Workers that should hold it whatever else they hold; 0 and ``replicas_max`` 0: every worker that fits."""
    replicas_max: int = 0
    labels: Mapping[str, str] = {}
    """What a worker must have to be given it."""

    load_balancing: LoadBalancing = LoadBalancing.LEAST_CONNECTIONS

    cache_ttl_s: float = 0.0
    """How long an answer is given again to a request with the same inputs; 0: never."""
    shadows: tuple[Shadow, ...] = ()


def default_config(model: str) -> ModelConfig:
    """What a model without an entry has."""
    return ModelConfig(model)


def check_config(config: ModelConfig) -> ModelConfig:
    """Return a configuration that can be acted on, by itself: what versions there are is looked at elsewhere.

    Raises:
        InvalidRequest: naming the field and what it may be.
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
        raise InvalidRequest("replicas_min is above replicas_max", field="replicas_min")
    _between("versions.latest", config.versions.latest, 0, 1024)
    _at_most("versions.specific", config.versions.specific)
    for number in config.versions.specific:
        _between("versions.specific", number, 1, 1 << 31)
    if config.versions.latest and config.versions.specific:
        raise InvalidRequest("versions has 'latest' and 'specific'; give one of them", field="versions")
    _at_most("labels", config.labels)
    for name, value in config.labels.items():
        if not 0 < len(name) <= 64 or len(value) > 64 or not (name + value).isprintable():
            raise InvalidRequest("a label is up to 64 printable characters, and so is its value", field="labels")


def _between(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{field} must be {low:g} to {high:g}", field=field)


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f"'{choice}'" for choice in choices if choice)
        raise InvalidRequest(f"{field} must be one of {listed}", field=field)


def _at_most(field: str, values: Mapping[str, object] | tuple[object, ...]) -> None:
    if len(values) > MOST:
        raise InvalidRequest(f"{field} has {len(values)} entries; at most {MOST} are allowed", field=field)
