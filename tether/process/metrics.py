"""All metrics of the platform in one place, each with unit and help. Names are an interface.

They register with prometheus_client's own registry once per process, and a process is one service.
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
ENVELOPES_REJECTED = Counter(
    "tether_envelopes_rejected_total", "Messages that were not acted on, by the error's code.", ["code"]
)

DEPENDENCY_READY = Gauge(
    "tether_dependency_ready",
    "1 while a dependency of this service works, as /readyz says; 0 when it does not.",
    ["dependency"],
)
BROKER_DISK_FREE = Gauge(
    "tether_broker_disk_free_bytes", "Free bytes of the disk that the broker stores on, where this service can see it."
)

KEYSET_VERSION = Gauge("tether_keyset_version", "Version of the keyset that this process goes by.")
KEYSETS_REFUSED = Counter(
    "tether_keysets_refused_total",
    "Keysets that were refused, by why: unsigned, undecodable, older, conflict, not_in_force.",
    ["reason"],
)

HTTP_REQUESTS = Counter("tether_http_requests_total", "Answered requests.", ["route", "status"])
LIMITED = Counter(
    "tether_requests_limited_total",
    "Requests refused by a limit: a key's rate or concurrency, its tenant's requests a minute, a model's queue, or a full gateway.",
    ["reason"],
)
INFER_SECONDS = Histogram(
    "tether_infer_seconds", "Seconds from a synchronous request's arrival to its answer.", ["model"], buckets=_SECONDS
)
INFER_INFLIGHT = Gauge("tether_infer_inflight", "Synchronous requests that wait for their answer.")
INFER_RESUBMITTED = Counter("tether_infer_resubmitted_total", "Bundles sent again because no answer could come.")
BUNDLE_JOBS = Histogram("tether_bundle_jobs", "Jobs in a published bundle.", ["kind"], buckets=_COUNTS)
JOBS_ACCEPTED = Counter("tether_jobs_accepted_total", "Durable jobs accepted.", ["model"])
JOBS_FINISHED = Counter("tether_jobs_finished_total", "Jobs that ended, by their last state.", ["model", "state"])
INFER_WITHDRAWN = Counter(
    "tether_infer_withdrawn_total",
    "Requests whose client disconnected before the answer, by where their job was: gateway (not sent), lane (sent to workers).",
    ["where"],
)
ANSWERS_LATE = Counter("tether_replies_unclaimed_total", "Answers nobody waited for any more.")

CACHE_HITS = Counter("tether_response_cache_hits_total", "Requests answered from the response cache.", ["model"])
CACHE_MISSES = Counter(
    "tether_response_cache_misses_total", "Requests that the response cache had no answer for.", ["model"]
)
CACHE_EVICTIONS = Counter("tether_response_cache_evictions_total", "Kept answers that made room for others.")
CACHE_BYTES = Gauge("tether_response_cache_bytes", "Bytes of answers that this gateway keeps.")

SHADOWS = Counter(
    "tether_shadow_requests_total",
    "Copies of requests for shadow versions, by how the answer compared with the caller's (equal, close, different), or why "
    "there was none (error, unavailable, dropped).",
    ["model", "version", "outcome"],
)

BATCH_ROWS = Histogram(
    "tether_batch_rows", "Rows in one run of a model; 1 for a job that is run as it came.", ["model"], buckets=_COUNTS
)
WORKER_CRASHES = Counter(
    "tether_worker_crashes_total",
    "Ends of a worker's process by a run or a load of a model, told after its restart.",
    ["model"],
)
BATCHING_STOPPED = Counter(
    "tether_batching_stopped_total", "Versions whose jobs are not joined any more, because a run mixed rows.", ["model"]
)
RUN_SECONDS = Histogram("tether_run_seconds", "Seconds of one run of a model.", ["model"], buckets=_SECONDS)
RUNS_ENDED = Counter(
    "tether_runs_ended_total",
    "Runs in a worker's own process that were ended before they were done, by why: time, memory, unwanted (no caller waits for "
    "them), unload.",
    ["model", "cause"],
)
HANDED_BACK = Counter(
    "tether_handed_back_total", "Bundles that a busy worker handed back, for another one to begin.", ["model"]
)
REDELIVERED = Counter("tether_redelivered_total", "Messages that were delivered more than once.", ["model"])
DEAD_LETTERS = Counter("tether_dead_letters_total", "Jobs that became dead letters.", ["model"])
RESULTS_REFUSED = Counter("tether_results_refused_total", "Results that came second and were refused.")
RESULTS_WAITING = Gauge(
    "tether_results_waiting",
    "Ended durable jobs whose results this worker could not store for a second or more: alarm when it stays above 0.",
)
RESULTS_WITHOUT_ROOM = Counter(
    "tether_results_without_room_total",
    "Durable jobs that ended as failed (storage_full) because results had no room for their outputs.",
    ["model"],
)
PULL_RESETS = Counter("tether_pull_restarts_total", "Pulls begun anew because the broker fell silent.")
MODEL_CRASHES = Counter(
    "tether_model_crashes_total",
    "Model processes that ended in a run or a load, by what ended them.",
    ["model", "reason"],
)
MODEL_RESTARTS = Counter("tether_model_restarts_total", "Model processes that were started again.", ["model"])
MODELS_LOADED = Gauge("tether_models_loaded", "Model versions this worker holds.")
MODELS_IN_MEMORY = Gauge("tether_models_in_memory", "Model versions that are loaded; others load at their next job.")
MODEL_MEMORY = Gauge(
    "tether_model_memory_bytes",
    "Memory that this worker counts for loaded models: bytes of their files, for each copy.",
)
MODEL_UNLOADS = Counter(
    "tether_model_unloads_total", "Versions that were unloaded and stay held, by why: memory, idle.", ["reason"]
)

CHUNKS_BYTES = Counter(
    "tether_chunks_bytes_total", "Bytes of model files that this worker read, by where from: broker, cache.", ["source"]
)
CHUNK_CACHE_BYTES = Gauge("tether_chunk_cache_bytes", "Bytes of chunks in this worker's cache.")
CHUNK_CACHE_LOST = Counter(
    "tether_chunk_cache_drops_total",
    "Times the cache lost a damaged chunk ('chunk') or was deleted as a whole: damaged, full, suspected, slow, "
    "too_large, unusable, disk.",
    ["reason"],
)
VERSIONS_EVICTED = Counter("tether_versions_evicted_total", "Assembled versions that a worker deleted to make room.")

WORKERS_READY = Gauge("tether_workers_ready", "Workers that the dispatcher routes to.")
VERSIONS_UNPLACED = Gauge(
    "tether_versions_unplaced", "Versions that are on fewer workers than their configuration asks for, or on none."
)
STREAMS_RENEWED = Counter(
    "tether_infer_streams_renewed_total",
    "Infer streams of a cluster that were made again, because the server that held them was away.",
)
LANES = Gauge("tether_lanes", "Lanes the dispatcher keeps consumers for.")
LANES_MADE_AGAIN = Counter(
    "tether_lanes_made_again_total",
    "Lane consumers that the dispatcher made again because they did not deliver, by why: ahead (of a stream that came back "
    "shorter after a power cut), stuck, missing. Alarm on any that no power cut explains.",
    ["reason"],
)
JOBS_OPEN = Gauge("tether_jobs_open", "Accepted durable jobs that have not ended, as the dispatcher counts them.")
JOBS_FORGOTTEN = Counter(
    "tether_jobs_forgotten_total",
    "Ended durable jobs that the dispatcher removed, by why: age (result_ttl_s), room (earlier, because a store was full).",
    ["reason"],
)
JOB_STORE_USED = Gauge(
    "tether_job_store_used_ratio",
    "How full what keeps durable jobs is: records, results. Ended jobs make room from 0.8 on.",
    ["store"],
)
JOBS_SWEPT = Counter(
    "tether_jobs_swept_total",
    "Durable jobs that the dispatcher found in no lane and without a result, and ended as failed (lost), and records of jobs "
    "that were never queued, which it removed (unqueued). Alarm on any that no power cut explains.",
    ["outcome"],
)

AUDIT_ENTRIES = Counter("tether_audit_entries_total", "Audit entries written by this service.", ["kind"])
AUDIT_LOST = Counter("tether_audit_lost_total", "Audit entries lost because spool and memory were full: alarm on any.")
AUDIT_SPOOL_BYTES = Gauge("tether_audit_spool_bytes", "Audit blocks that wait for the broker on this service's disk.")
AUDIT_FULL = Gauge("tether_audit_full", "1 while the audit stream is at its size bound and takes nothing: alarm on 1.")

MODELS_REGISTERED = Counter("tether_models_registered_total", "Versions that became ready.")
MODELS_REJECTED = Counter("tether_models_rejected_total", "Pushed models that were refused.")
COLLECTIONS = Counter("tether_gc_runs_total", "Collections of unreferenced chunks, by outcome.", ["outcome"])
COLLECTION_SECONDS = Histogram("tether_gc_seconds", "Seconds of one collection.", buckets=_SECONDS)
COLLECTED_CHUNKS = Counter("tether_gc_removed_chunks_total", "Chunks that no version named and that were removed.")
COLLECTED_BYTES = Counter("tether_gc_removed_bytes_total", "Bytes of the chunks that were removed.")
UNREFERENCED_CHUNKS = Gauge("tether_unreferenced_chunks", "Stored chunks that no version named at the last look.")
PARTITIONS = Gauge("tether_partitions", "Partitions of the store that this model store looks after.")
SCRUBBED_BYTES = Counter("tether_scrubbed_bytes_total", "Bytes of stored chunks that were read and compared.")
SCRUBS = Counter("tether_scrubs_total", "Passes over all stored chunks that came to their end.")
REPAIRED_CHUNKS = Counter(
    "tether_repaired_chunks_total",
    "Damaged chunks that a pass asked workers for, by outcome: repaired, not_held.",
    ["outcome"],
)
DAMAGED_CHUNKS = Gauge(
    "tether_damaged_chunks", "Chunks that a version names and that are missing or altered: alarm on any."
)


def dependencies(checks: Mapping[str, str]) -> None:
    """Bring :data:`DEPENDENCY_READY` in line with what ``/readyz`` says: ``ok``, or what is wrong with a dependency."""
    for name, state in checks.items():
        DEPENDENCY_READY.labels(name).set(1 if state == "ok" else 0)


def exposition(shows: Callable[[str], bool] | None = None) -> tuple[bytes, str]:
    """All metrics in Prometheus' text form, and its content type. ``shows``: whether samples that name this model are told."""
    registry = REGISTRY if shows is None else _Shown(shows)
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Shown(CollectorRegistry):
    """The process's own registry without the samples of some models."""

    def __init__(self, shows: Callable[[str], bool]) -> None:
        super().__init__()
        self._shows = shows

    def collect(self) -> Iterator[Metric]:
        for family in REGISTRY.collect():
            told = [sample for sample in family.samples if self._tells(sample.labels)]
            if told or not family.samples:
                shown = Metric(family.name, family.documentation, family.type, family.unit)
                shown.samples = told
                yield shown

    def _tells(self, labels: Mapping[str, str]) -> bool:
        return "model" not in labels or self._shows(labels["model"])
