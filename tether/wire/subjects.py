"""Names of all streams, subjects, buckets and consumers: built and parsed only here.

Names that clients choose match ``[a-z0-9][a-z0-9._-]*`` (see :func:`tether.domain.manifest.check_name`); a
dot would split a subject, so it is encoded as ``=``, which no name contains. A model of another tenant than
``default`` is called ``tenant/model`` (see :mod:`tether.domain.model_names`); the slash is kept, except in
consumer names, which cannot have one.
"""

from __future__ import annotations

import zlib

from tether.domain.job import SHARED, Lane, LaneKind, Priority

BUCKETS = (
    "liveness",
    "models",
    "aliases",
    "configs",
    "notes",
    "leases",
    "routes",
    "assign",
    "keyset",
    "apikeys",
    "keyuse",
    "tenants",
    "tenantkeys",
    "modelkeys",
    "jobs",
    "attempts",
    "puts",
)
"""Every key-value bucket of the platform."""


def token(name: str) -> str:
    """Encode a client-chosen name as one subject token."""
    return name.replace(".", "=")


def name_of(subject_token: str) -> str:
    """Decode a name encoded by :func:`token`."""
    return subject_token.replace("=", ".")


def pool_token(pool: str) -> str:
    """Return the token of an isolated tenant's streams and keys; unlike any shard number or job id."""
    return f"={token(pool)}"


class Names:
    """All names of one platform. Platforms with different prefixes can share a server."""

    def __init__(
        self, prefix: str = "tether", *, infer_shards: int = 1, job_shards: int = 1, partitions: int = 1
    ) -> None:
        self.prefix = prefix
        self.infer_shards = infer_shards
        self.job_shards = job_shards
        self.partitions = partitions
        self._upper = prefix.upper()
        self.results_stream = f"{self._upper}_RESULTS"
        self.dead_stream = f"{self._upper}_DEAD"
        self.audit_stream = f"{self._upper}_AUDIT"

    # streams

    def infer_stream(self, shard: int | str) -> str:
        return f"{self._upper}_INFER_{shard}"

    def is_infer_stream(self, stream: str) -> bool:
        return stream.startswith(self.infer_stream(""))

    def jobs_stream(self, shard: int | str) -> str:
        return f"{self._upper}_JOBS_{shard}"

    def lane_stream(self, lane: Lane) -> str:
        """Return the stream of a lane: its model's shard, or its isolated tenant's own."""
        if lane.kind is LaneKind.INFER:
            return self.infer_stream(self._infer_shard(lane))
        return self.jobs_stream(self._jobs_shard(lane))

    def infer_subjects(self, shard: int | str) -> str:
        return f"{self.prefix}.infer.{shard}.>"

    def jobs_subjects(self, shard: int | str) -> str:
        return f"{self.prefix}.job.{shard}.>"

    def every_job(self) -> str:
        """Return the subject filter of the jobs lanes of all pools."""
        return f"{self.prefix}.job.>"

    def _infer_shard(self, lane: Lane) -> int | str:
        return _shard(lane.model, self.infer_shards) if lane.pool == SHARED else pool_token(lane.pool)

    def _jobs_shard(self, lane: Lane) -> int | str:
        return _shard(lane.model, self.job_shards) if lane.pool == SHARED else pool_token(lane.pool)

    def pool_infer_stream(self, pool: str) -> str:
        """Return the infer stream of an isolated tenant."""
        return self.infer_stream(pool_token(pool))

    def pool_jobs_stream(self, pool: str) -> str:
        return self.jobs_stream(pool_token(pool))

    def pool_streams(self, pool: str) -> list[str]:
        """Return the streams of an isolated tenant."""
        return [self.pool_infer_stream(pool), self.pool_jobs_stream(pool), self.pool_results_stream(pool)]

    def stream_pool(self, stream: str) -> str | None:
        """Return the isolated tenant of a jobs stream; None for any other stream."""
        start = self.jobs_stream("=")
        return name_of(stream[len(start) :]) if stream.startswith(start) else None

    # lanes

    def lane(self, lane: Lane) -> str:
        """Return the subject that bundles of a lane are published on."""
        tail = f"{lane.region}.{token(lane.pool)}.{token(lane.model)}.{lane.version}"
        if lane.kind is LaneKind.INFER:
            return f"{self.prefix}.infer.{self._infer_shard(lane)}.{tail}"
        return f"{self.prefix}.job.{self._jobs_shard(lane)}.{lane.priority.value}.{tail}"

    def lane_consumer(self, lane: Lane) -> str:
        """Return the durable pull consumer of a lane; unique in its stream, because no name contains a ``+``."""
        level = "" if lane.kind is LaneKind.INFER else f"{lane.priority.value}+"
        return f"{level}{lane.region}+{token(lane.pool)}+{token(lane.model).replace('/', '~')}+{lane.version}"

    def parse_lane_consumer(self, consumer: str) -> Lane | None:
        """Return the lane of a consumer of a lane's stream, or None."""
        parts = consumer.split("+")
        kind, priority = LaneKind.INFER, Priority.NORMAL
        try:
            if len(parts) == 5:
                kind, priority = LaneKind.JOB, Priority(parts.pop(0))
            region, pool, model, version = parts
            return Lane(kind, name_of(model.replace("~", "/")), int(version), region, name_of(pool), priority)
        except ValueError:
            return None

    def parse_lane(self, subject: str) -> Lane | None:
        """Return the lane of a subject, or None if it is not a lane of this platform."""
        parts = subject.split(".")
        try:
            if parts[0] != self.prefix:
                return None
            if parts[1] == "infer":
                _, _, _, region, pool, model, version = parts
                return Lane(LaneKind.INFER, name_of(model), int(version), region, name_of(pool))
            if parts[1] == "job":
                _, _, _, priority, region, pool, model, version = parts
                return Lane(LaneKind.JOB, name_of(model), int(version), region, name_of(pool), Priority(priority))
        except (ValueError, IndexError):
            return None
        return None

    # probes by which gateways test that streams accept messages; no lane, job or result has such a name

    def infer_probe(self, shard: int | str) -> str:
        return f"{self.prefix}.infer.{shard}.probe"

    def jobs_probe(self, shard: int | str) -> str:
        return f"{self.prefix}.job.{shard}.probe"

    def result_probe(self, gateway: str) -> str:
        """Return the probe's subject; ``gateway`` identifies one run of one gateway."""
        return self.result(f"probe-{gateway}")

    # withdrawals

    def withdrawn(self, lane: Lane) -> str:
        """Return the subject on which workers of an infer lane receive withdrawals; core NATS, nothing is
        stored."""
        return f"{self.prefix}.withdrawn.{lane.region}.{token(lane.pool)}.{token(lane.model)}.{lane.version}"

    def all_withdrawn(self, pool: str = "*") -> str:
        """Return the filter of :meth:`withdrawn` for every lane, or for those of one pool."""
        return f"{self.prefix}.withdrawn.*.{pool if pool == '*' else token(pool)}.*.*"

    # results, replies, dead letters

    def result(self, job: str, pool: str = SHARED) -> str:
        return f"{self.prefix}.result.{job}" if pool == SHARED else f"{self.prefix}.result.{pool_token(pool)}.{job}"

    def results(self, pool: str = SHARED) -> str:
        """Return the filter of all results of a pool; an isolated tenant's are one level deeper."""
        return self.result("*", pool)

    def ended(self, job: str, pool: str = SHARED) -> str:
        """Return the subject on which the results stream republishes, without body, that a job has finished."""
        return f"{self.prefix}.ended.{job}" if pool == SHARED else f"{self.prefix}.ended.{pool_token(pool)}.{job}"

    def every_end(self) -> str:
        """Return the filter of :meth:`ended` for all jobs of all pools."""
        return f"{self.prefix}.ended.>"

    def pool_results_stream(self, pool: str) -> str:
        """Return the stream of a pool's results."""
        return self.results_stream if pool == SHARED else f"{self.results_stream}_{pool_token(pool)}"

    def attempt_key(self, id: str, pool: str = SHARED) -> str:
        """Return the key of an attempt note in its bucket.

        The pool is last: a worker's read permission has a wildcard for the id and ends with the pool, so no
        wildcard in place of the id reaches another pool's notes.
        """
        return f"{id}.{SHARED if pool == SHARED else pool_token(pool)}"

    def reply(self, gateway: str) -> str:
        """Return the subject of a gateway's reply bundles; ``gateway`` identifies one run of one gateway."""
        return f"{self.prefix}.reply.{gateway}"

    def dead(self, lane: Lane) -> str:
        return f"{self.prefix}.dead.{token(lane.pool)}.{token(lane.model)}.{lane.version}"

    def dead_subjects(self, pool: str = "") -> str:
        """Return the filter of all dead letters, or of one pool's."""
        return f"{self.prefix}.dead.{token(pool)}.>" if pool else f"{self.prefix}.dead.>"

    # audit and limits

    def audit(self, tenant: str, kind: str) -> str:
        """Return the subject of entries of one tenant and kind; ``-`` means no tenant."""
        return f"{self.prefix}.audit.{token(tenant) or '-'}.{kind}"

    def audit_subjects(self) -> str:
        return f"{self.prefix}.audit.>"

    def demand(self) -> str:
        """Return the subject on which gateways exchange demand per limit; core NATS, nothing is stored."""
        return f"{self.prefix}.demand"

    # services

    def service(self, name: str) -> str:
        """Return the request subject of a service endpoint such as ``registerWorker``."""
        return f"{self.prefix}.svc.{name}"

    def store_service(self, name: str, partition: int, epoch: int) -> str:
        """Return the request subject of a partition's owner; earlier owners, with other epochs, do not
        receive it."""
        return f"{self.service(name)}.{partition}.{epoch}"

    def wanted(self, worker: str) -> str:
        """Return the subject on which a worker is asked for chunks that the store has lost."""
        return f"{self.prefix}.wanted.{worker if worker == '*' else token(worker)}"

    def chunk(self, worker: str) -> str:
        """Return the subject on which a worker sends such chunks."""
        return f"{self.prefix}.piece.{worker if worker == '*' else token(worker)}"

    def store_services(self, name: str) -> str:
        """Return the filter of :meth:`store_service` for all partitions."""
        return f"{self.service(name)}.*.*"

    # key-value buckets: see BUCKETS

    def bucket(self, name: str) -> str:
        return f"{self._upper}_{name}"

    def bucket_stream(self, name: str) -> str:
        return f"KV_{self.bucket(name)}"

    def bucket_key(self, name: str, key: str) -> str:
        """Return the subject of one entry."""
        return f"$KV.{self.bucket(name)}.{key}"

    def version_key(self, model: str, version: int, pool: str = SHARED) -> str:
        """Return the key of a version, or of its route in a pool."""
        key = f"{token(model)}.{version}"
        return key if pool == SHARED else f"{key}.{pool_token(pool)}"

    # model chunks, in JetStream object-store form (NATS ADR-20)

    def partition(self, model: str) -> int:
        """Return the partition of new versions of a model; existing ones have theirs in the manifest."""
        return _shard(model, self.partitions)

    def chunk_bucket(self, model: str) -> str:
        return self.partition_bucket(self.partition(model))

    def partition_bucket(self, partition: int) -> str:
        return f"{self._upper}_CHUNKS_{partition}"

    def chunk_buckets(self) -> list[str]:
        return [self.partition_bucket(partition) for partition in range(self.partitions)]

    def object_stream(self, bucket: str) -> str:
        return f"OBJ_{bucket}"

    def object_chunk(self, bucket: str, nuid: str) -> str:
        return f"$O.{bucket}.C.{nuid}"

    def object_meta(self, bucket: str, encoded_name: str) -> str:
        return f"$O.{bucket}.M.{encoded_name}"

    # inboxes

    def inbox(self, role: str, identity: str) -> str:
        """Return the inbox prefix of one identity, the only one that it may subscribe to."""
        return f"_INBOX.{self.prefix}.{role}.{token(identity)}"


def _shard(name: str, shards: int) -> int:
    """Return a shard number that is stable over processes and versions, unlike ``hash``."""
    return zlib.crc32(name.encode()) % shards
