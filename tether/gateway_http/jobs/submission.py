"""Accepts durable jobs: checks, claims, stores and queues all jobs of a request, or none."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import TenantSeals
from tether.bus.retry import RetryDeadline
from tether.domain.job import (
    Failure,
    Job,
    JobRecord,
    JobState,
    Priority,
    idempotency_digest,
    new_durable_job_id,
    new_keyed_job_id,
)
from tether.domain.manifest import check_outputs
from tether.domain.tensor import Tensor
from tether.errors import BrokerUnavailable, IdempotencyConflict, JobCancelled, TetherError, Unavailable
from tether.gateway_http.access.tenants import Tenants
from tether.gateway_http.jobs.bundler import JobBundler, Submission
from tether.gateway_http.jobs.ends import JobEnds, ids_of
from tether.gateway_http.jobs.queue_shares import JobShares
from tether.gateway_http.jobs.queued_jobs_quota import QueuedJobsQuota
from tether.gateway_http.jobs.records import Entered, JobRecordStore, KeptRecord
from tether.gateway_http.jobs.store_room import JobStores
from tether.gateway_http.models.catalog import Catalog, ResolvedVersion
from tether.process import metrics
from tether.process.lifecycle import Tasks

log = logging.getLogger(__name__)

_TRIES = 3
"""Tries for a lost claim: the winner may have sent a different request."""

_CLAIM_S = 2.0
"""Seconds that another request's claim may take to be accepted, before its gateway is presumed dead."""

_LOOK_S = 0.05

JOB_OVERHEAD = 128
"""Approximate bytes of a job in its lane beyond its inputs."""


class NewJob(msgspec.Struct, frozen=True):
    """A parsed and resolved request for a durable job; without a priority it gets its model's default."""

    served: ResolvedVersion
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    priority: Priority | None
    deadline_s: float
    idempotency_key: str
    request_id: str
    traceparent: str = ""


class Accepted(msgspec.Struct, frozen=True):
    """A job's record; ``before`` is set if it was accepted earlier under the same Idempotency-Key."""

    record: JobRecord
    before: bool = False


class JobSubmitter:
    """Accepts durable jobs for one gateway."""

    def __init__(
        self,
        bus: Bus,
        catalog: Catalog,
        tenants: Tenants,
        tasks: Tasks,
        seals: TenantSeals,
        *,
        records: JobRecordStore,
        room: QueuedJobsQuota,
        shared: Callable[[str], bool],
    ) -> None:
        self._bus = bus
        self._catalog = catalog
        self._tenants = tenants
        self._seals = seals
        self._records = records
        self._room = room
        self._ends = JobEnds(bus)
        self._stores = JobStores(bus)
        self._shares = JobShares(bus, self._stores.uses, tenants, shared)
        self._bundler = JobBundler(bus, tasks, tenants.weight, records, stores=self._stores, job_s=catalog.job_s)

    async def submit(self, tenant: str, requests: Sequence[NewJob]) -> list[Accepted]:
        """Accept jobs; return their records in the order of ``requests``.

        If one is rejected, none of them is run, except those that a worker has already started.

        Raises:
            BadTensor, ModelNotReady: before anything was stored.
            IdempotencyConflict: a key was used for another request.
            QuotaExceeded, QueueFull: no room.
            BrokerUnavailable: unknown whether they are stored; retry with the same key.
        """
        pool = self._tenants.pool(tenant)
        for request in requests:
            self._catalog.check_inputs(request.served, request.inputs, pool)
            check_outputs(request.served.manifest, request.outputs)
            self._catalog.require_lane(request.served, pool)
        now, patience = self._bus.clock.utc(), RetryDeadline(self._bus)
        items = {place: self._submission(tenant, pool, request, now) for place, request in enumerate(requests)}
        done: dict[int, Accepted] = {}
        new: list[Entered] = []
        try:
            for _ in range(_TRIES):
                held = await self._settled(
                    {place: item for place, item in items.items() if place not in done}, patience
                )
                known = {place: job for place, one in held.items() if (job := _job(one)) is not None}
                done |= {place: Accepted(record, before=True) for place, record in known.items()}
                fresh = {place: self._after(items[place], held.get(place)) for place in items if place not in done}
                for place, entered in (await self._store(tenant, fresh, patience)).items():
                    done[place] = Accepted(entered.record)
                    new.append(entered)
                if len(done) == len(items):
                    return [done[place] for place in items]
            raise Unavailable("the Idempotency-Key is in use by another request; try again")
        except TetherError as error:
            if not isinstance(error, BrokerUnavailable):
                await self._take_back(new)
            raise

    def _submission(self, tenant: str, pool: str, request: NewJob, now: float) -> Submission:
        key = idempotency_digest(tenant, request.idempotency_key) if request.idempotency_key else ""
        job_id = new_keyed_job_id(key) if key else new_durable_job_id(tenant)
        deadline = now + request.deadline_s
        job = Job(job_id, tenant, request.inputs, deadline, request.outputs, request.request_id, request.traceparent)
        digest = _digest(request) if key else ""
        lane = request.served.job_lane(request.priority or self._catalog.default_priority(request.served), pool)
        record = JobRecord(
            id=job_id,
            tenant=tenant,
            model=lane.model,
            version=lane.version,
            priority=lane.priority,
            submitted_at=now,
            deadline=deadline,
            digest=self._seals.digest(tenant, digest),
            bundle="",
            request_id=request.request_id,
            pool=pool,
            size=job.size + JOB_OVERHEAD,
        )
        return Submission(lane, job, record, digest, key)

    async def _settled(self, items: Mapping[int, Submission], patience: RetryDeadline) -> dict[int, KeptRecord]:
        """Return the entries of a request's keys, once no other request is storing a job under one of them.

        Raises:
            IdempotencyConflict: a key has another request's job.
        """
        keyed = {place: item for place, item in items.items() if item.key}
        end = self._bus.clock.monotonic() + _CLAIM_S
        while keyed:
            found = await patience.until_done(lambda: self._records.held([item.key for item in keyed.values()]))
            held = {place: found[item.key] for place, item in keyed.items()}
            for place, one in held.items():
                if one.record is not None and not await self._same(one.record, items[place]):
                    raise _conflict()
            claimed = any(one.record is not None and _job(one) is None for one in held.values())
            if not claimed or self._bus.clock.monotonic() >= end:
                return held
            await asyncio.sleep(_LOOK_S)
        return {}

    async def _same(self, record: JobRecord, item: Submission) -> bool:
        return await self._seals.same_digest(record.tenant, record.digest, item.digest)

    def _after(self, item: Submission, held: KeptRecord | None) -> Submission:
        """Return the submission to store. A claim of a dead gateway keeps its id: its bundle may have been
        queued."""
        if held is not None and held.record is not None:
            job_id = held.record.id
            record = msgspec.structs.replace(item.record, id=job_id)
            item = msgspec.structs.replace(item, job=msgspec.structs.replace(item.job, id=job_id), record=record)
        after = 0 if held is None else held.sequence
        return msgspec.structs.replace(item, job=self._seals.seal(item.job), after=after)

    async def _store(self, tenant: str, fresh: Mapping[int, Submission], patience: RetryDeadline) -> dict[int, Entered]:
        """Store and queue jobs; return all but those whose claim was lost."""
        if not fresh:
            return {}
        streams = {self._bus.names.lane_stream(item.lane) for item in fresh.values()}
        pool = next(iter(fresh.values())).record.pool
        await self._stores.require(pool, streams)
        await self._shares.require(tenant, len(fresh), self._by_stream(fresh))
        records = [item.record for item in fresh.values()]
        async with AsyncExitStack() as stack:
            await patience.until_done(lambda: stack.enter_async_context(self._room.hold(tenant, records)))
            waiting = [self._bundler.add(item) for item in fresh.values()]
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            stored = {place: end for place, end in zip(fresh, ends, strict=True) if isinstance(end, Entered)}
            errors = [end for end in ends if isinstance(end, BaseException)]
            if errors:
                unknown = [error for error in errors if isinstance(error, BrokerUnavailable)]
                if not unknown:
                    await self._take_back(list(stored.values()))
                raise [*unknown, *errors][0]
        for entered in stored.values():
            metrics.JOBS_ACCEPTED.labels(entered.record.model).inc()
            if log.isEnabledFor(logging.DEBUG):
                log.debug("job accepted", extra={"action": "job_accepted", **ids_of(entered.record)})
        return stored

    def _by_stream(self, fresh: Mapping[int, Submission]) -> Counter[str]:
        """Sum up the bytes of the jobs by lane stream."""
        found = Counter[str]()
        for item in fresh.values():
            found[self._bus.names.lane_stream(item.lane)] += item.record.size
        return found

    async def _take_back(self, stored: Sequence[Entered]) -> None:
        """Cancel and delete the accepted jobs of a request that is rejected as a whole; its client will
        resend all."""
        failure = Failure(JobCancelled.code, "another job of the same request was refused")
        ends = [self._ends.end(item.record, JobState.CANCELLED, failure, 0) for item in stored]
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, Exception):
                log.warning(
                    "job of a rejected request not cancelled, it may run: %s",
                    result,
                    extra={"action": "job_not_taken_back"},
                )
        await self._records.discard(stored)


def _job(held: KeptRecord) -> JobRecord | None:
    """Return the accepted job of a key; None if there is at most a claim."""
    return held.record if held.record is not None and held.record.bundle else None


def _digest(request: NewJob) -> str:
    """Return the identity of a request: model, inputs, outputs, requested priority.

    The version that an alias pointed to is not part of it.
    """
    manifest = request.served.manifest
    whole = hashlib.sha256(f"{manifest.name}\0{request.priority or Priority.NORMAL}\0{request.outputs}".encode())
    for tensor in request.inputs:
        whole.update(f"{tensor.name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        whole.update(tensor.data)
    return whole.hexdigest()


def _conflict() -> IdempotencyConflict:
    return IdempotencyConflict(
        "this Idempotency-Key was used for another request; use a new key", field="Idempotency-Key"
    )
