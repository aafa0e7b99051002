"""All metrics of the platform, each with unit and help. Names are a public interface.

They are registered once per process with prometheus_client's registry; a process is one service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

BROKER_CONNECTED = Gauge("tether_broker_connected", "1 while this process is connected to the broker.")
BROKER_RECONNECTS = Counter("tether_broker_reconnects_total", "Times this process reconnected to the broker.")
PERMISSION_DENIED = Counter("tether_permission_denied_total", "Subjects the broker refused to this identity.")
ENVELOPES_REJECTED = Counter("tether_envelopes_rejected_total", "Messages that were rejected, by error code.", ["code"])

DEPENDENCY_READY = Gauge(
    "tether_dependency_ready",
    "1 while a dependency of this service works, as in /readyz; 0 otherwise.",
    ["dependency"],
)
BROKER_DISK_FREE = Gauge(
    "tether_broker_disk_free_bytes", "Free bytes on the broker's disk, if this service can see it."
)

KEYSET_VERSION = Gauge("tether_keyset_version", "Version of the keyset that this process uses.")
KEYSETS_REFUSED = Counter(
    "tether_keysets_refused_total",
    "Rejected keysets by reason: unsigned, undecodable, older, conflict, not_in_force.",
    ["reason"],
)

HTTP_REQUESTS = Counter("tether_http_requests_total", "Answered requests.", ["route", "status"])
LIMITED = Counter(
    "tether_requests_limited_total",
    "Requests refused by a limit: a key's rate or concurrency, a tenant's requests a minute, a model's queue, full gateway.",
    ["reason"],
)
INFER_SECONDS = Histogram(
    "tether_infer_seconds", "Seconds from a synchronous request's arrival to its response.", ["model"], buckets=_SECONDS
)
INFER_INFLIGHT = Gauge("tether_infer_inflight", "Synchronous requests that wait for their response.")
INFER_RESUBMITTED = Counter("tether_infer_resubmitted_total", "Bundles sent again because their reply was lost.")
BUNDLE_JOBS = Histogram("tether_bundle_jobs", "Jobs in a published bundle.", ["kind"], buckets=_COUNTS)
JOBS_ACCEPTED = Counter("tether_jobs_accepted_total", "Durable jobs accepted.", ["model"])
JOBS_FINISHED = Counter("tether_jobs_finished_total", "Jobs that finished, by final state.", ["model", "state"])
INFER_WITHDRAWN = Counter(
    "tether_infer_withdrawn_total",
    "Requests whose client disconnected early, by where their job was: gateway (not sent), lane (sent to workers).",
    ["where"],
)
ANSWERS_LATE = Counter("tether_replies_unclaimed_total", "Replies received after their request timed out.")

CACHE_HITS = Counter("tether_response_cache_hits_total", "Requests answered from the response cache.", ["model"])
CACHE_MISSES = Counter("tether_response_cache_misses_total", "Requests with no match in the response cache.", ["model"])
CACHE_EVICTIONS = Counter("tether_response_cache_evictions_total", "Cached responses that were evicted.")
CACHE_BYTES = Gauge("tether_response_cache_bytes", "Bytes of cached responses in this gateway.")

SHADOWS = Counter(
    "tether_shadow_requests_total",
    "Mirrored requests to shadow versions, by how their response compared with the caller's (equal, close, different), or why "
    "there was none (error, unavailable, dropped).",
    ["model", "version", "outcome"],
)

BATCH_ROWS = Histogram(
    "tether_batch_rows", "Rows in one run of a model; 1 for a job that is not batched.", ["model"], buckets=_COUNTS
)
WORKER_CRASHES = Counter(
    "tether_worker_crashes_total",
    "Crashes of a worker's process in a run or a load of a model, counted after its restart.",
    ["model"],
)
BATCHING_STOPPED = Counter(
    "tether_batching_stopped_total",
    "Versions whose jobs are no longer batched, because a run mixed their rows.",
    ["model"],
)
RUN_SECONDS = Histogram("tether_run_seconds", "Seconds of one run of a model.", ["model"], buckets=_SECONDS)
RUNS_ENDED = Counter(
    "tether_runs_ended_total",
    "Runs in a worker's own process that were ended early, by reason: time, memory, unwanted (no caller waits for "
    "them), unload.",
    ["model", "cause"],
)
HANDED_BACK = Counter("tether_handed_back_total", "Bundles that a busy worker handed back for another one.", ["model"])
REDELIVERED = Counter("tether_redelivered_total", "Messages that were delivered more than once.", ["model"])
DEAD_LETTERS = Counter("tether_dead_letters_total", "Jobs that became dead letters.", ["model"])
RESULTS_REFUSED = Counter("tether_results_refused_total", "Duplicate results that were refused.")
RESULTS_WAITING = Gauge(
    "tether_results_waiting",
    "Finished durable jobs whose results this worker could not store within a second: alarm when it stays above 0.",
)
RESULTS_WITHOUT_ROOM = Counter(
    "tether_results_without_room_total",
    "Durable jobs that failed (storage_full) because there was no space for their outputs.",
    ["model"],
)
PULL_RESETS = Counter("tether_pull_restarts_total", "Pull requests restarted after missed heartbeats.")
MODEL_CRASHES = Counter(
    "tether_model_crashes_total",
    "Model processes that ended in a run or a load, by cause.",
    ["model", "reason"],
)
MODEL_RESTARTS = Counter("tether_model_restarts_total", "Model processes that were restarted.", ["model"])
MODELS_LOADED = Gauge("tether_models_loaded", "Model versions that this worker hosts.")
MODELS_IN_MEMORY = Gauge(
    "tether_models_in_memory", "Model versions that are loaded; other hosted ones load on their next job."
)
MODEL_MEMORY = Gauge(
    "tether_model_memory_bytes",
    "Memory counted for loaded models: bytes of their files for each instance.",
)
MODEL_UNLOADS = Counter(
    "tether_model_unloads_total", "Versions that were unloaded and stay hosted, by reason: memory, idle.", ["reason"]
)

CHUNKS_BYTES = Counter(
    "tether_chunks_bytes_total", "Bytes of model files that this worker read, by source: broker, cache.", ["source"]
)
CHUNK_CACHE_BYTES = Gauge("tether_chunk_cache_bytes", "Bytes of chunks in this worker's cache.")
CHUNK_CACHE_LOST = Counter(
    "tether_chunk_cache_drops_total",
    "Losses in the chunk cache: a damaged chunk ('chunk'), or the whole cache: damaged, full, suspected, slow, "
    "too_large, unusable, disk.",
    ["reason"],
)
VERSIONS_EVICTED = Counter("tether_versions_evicted_total", "Assembled versions that a worker evicted.")

WORKERS_READY = Gauge("tether_workers_ready", "Workers that the dispatcher routes to.")
VERSIONS_UNPLACED = Gauge("tether_versions_unplaced", "Versions on fewer workers than configured, or on none.")
STREAMS_RENEWED = Counter(
    "tether_infer_streams_renewed_total",
    "Infer streams of a cluster that were recreated because their server was down.",
)
LANES = Gauge("tether_lanes", "Lanes the dispatcher keeps consumers for.")
LANES_MADE_AGAIN = Counter(
    "tether_lanes_made_again_total",
    "Lane consumers that the dispatcher recreated because they did not deliver, by reason: ahead (of a stream that came back "
    "shorter after a power cut), stuck, missing. Alarm on any without a power cut.",
    ["reason"],
)
JOBS_OPEN = Gauge("tether_jobs_open", "Accepted durable jobs that have not finished, by the dispatcher's count.")
JOBS_FORGOTTEN = Counter(
    "tether_jobs_forgotten_total",
    "Finished durable jobs that the dispatcher deleted, by reason: age (result_ttl_s), room (earlier, in a full store).",
    ["reason"],
)
JOB_STORE_USED = Gauge(
    "tether_job_store_used_ratio",
    "Used fraction of the stores of durable jobs: records, results. From 0.8 on the oldest finished jobs are deleted.",
    ["store"],
)
JOBS_SWEPT = Counter(
    "tether_jobs_swept_total",
    "Durable jobs that the dispatcher failed because they were in no lane and had no result (lost), and records of jobs "
    "that were never queued, which it deleted (unqueued). Alarm on any without a power cut.",
    ["outcome"],
)

AUDIT_ENTRIES = Counter("tether_audit_entries_total", "Audit entries written by this service.", ["kind"])
AUDIT_LOST = Counter("tether_audit_lost_total", "Audit entries lost because spool and memory were full: alarm on any.")
AUDIT_SPOOL_BYTES = Gauge(
    "tether_audit_spool_bytes", "Audit blocks on this service's disk that the broker has not stored yet."
)
AUDIT_FULL = Gauge("tether_audit_full", "1 while the audit stream is at its size limit and stores nothing: alarm on 1.")

MODELS_REGISTERED = Counter("tether_models_registered_total", "Versions that became ready.")
MODELS_REJECTED = Counter("tether_models_rejected_total", "Pushed models that were rejected.")
COLLECTIONS = Counter("tether_gc_runs_total", "Collections of unreferenced chunks, by outcome.", ["outcome"])
COLLECTION_SECONDS = Histogram("tether_gc_seconds", "Seconds of one collection.", buckets=_SECONDS)
COLLECTED_CHUNKS = Counter("tether_gc_removed_chunks_total", "Unreferenced chunks that were deleted.")
COLLECTED_BYTES = Counter("tether_gc_removed_bytes_total", "Bytes of the chunks that were deleted.")
UNREFERENCED_CHUNKS = Gauge("tether_unreferenced_chunks", "Unreferenced chunks at the last check.")
PARTITIONS = Gauge("tether_partitions", "Partitions that this model store owns.")
SCRUBBED_BYTES = Counter("tether_scrubbed_bytes_total", "Bytes of stored chunks that were read and verified.")
SCRUBS = Counter("tether_scrubs_total", "Completed passes over all stored chunks.")
REPAIRED_CHUNKS = Counter(
    "tether_repaired_chunks_total",
    "Damaged chunks that a pass requested from workers, by outcome: repaired, not_held.",
    ["outcome"],
)
DAMAGED_CHUNKS = Gauge("tether_damaged_chunks", "Referenced chunks that are missing or altered: alarm on any.")


def dependencies(checks: Mapping[str, str]) -> None:
    """Update :data:`DEPENDENCY_READY` from the checks of ``/readyz``: ``ok``, or what is wrong."""
    for name, state in checks.items():
        DEPENDENCY_READY.labels(name).set(1 if state == "ok" else 0)


def exposition(shows: Callable[[str], bool] | None = None) -> tuple[bytes, str]:
    """Return all metrics in Prometheus' text form, and its content type. ``shows`` selects models by name."""
    registry = REGISTRY if shows is None else _Shown(shows)
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Shown(CollectorRegistry):
    """The process's own registry without the samples of some models."""

    def __init__(self, shows: Callable[[str], bool]) -> None:
        super().__init__()
        self._shows = shows

    def collect(self) -> Iterator[Metric]:
        for family in REGISTRY.collect():
            visible = [sample for sample in family.samples if self._is_visible(sample.labels)]
            if visible or not family.samples:
                shown = Metric(family.name, family.documentation, family.type, family.unit)
                shown.samples = visible
                yield shown

    def _is_visible(self, labels: Mapping[str, str]) -> bool:
        return "model" not in labels or self._shows(labels["model"])
