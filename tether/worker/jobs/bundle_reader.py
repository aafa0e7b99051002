"""Verifies and decodes bundles pulled from lanes, and delivers the outcomes of their jobs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import Keyring
from tether.crypto import MAX_SKEW_MS, Header, MessageType
from tether.domain.job import Failure, Job, JobId, JobState, Lane, LaneKind, Outcome, as_it_counts
from tether.errors import (
    BadEncoding,
    ClockSkew,
    EnvelopeError,
    EnvelopeExpired,
    InferenceFailed,
    KeyExpired,
    SubjectMismatch,
    UnknownKey,
)
from tether.process import metrics
from tether.streams.lane_consumer import Delivery
from tether.wire import codec
from tether.worker.jobs import payload_encryption
from tether.worker.jobs.outcome_publisher import OutcomePublisher
from tether.worker.scheduling.bundle import Bundle

log = logging.getLogger(__name__)


class BundleReader:
    """Reads the deliveries of one model's lanes and delivers their outcomes."""

    def __init__(self, bus: Bus, keyring: Keyring, model: str) -> None:
        self._bus = bus
        self._keyring = keyring
        self._settings = bus.settings
        self._model = model
        self.answers = OutcomePublisher(bus)

    async def read(self, delivery: Delivery) -> Bundle | None:
        """Verify a delivery, then decode it. Return None if it cannot be run.

        An invalid delivery is acknowledged, because redelivery would change nothing. If this worker's clock
        or keyset may be the cause, the delivery is left for another worker.
        """
        kind = MessageType.INFER if delivery.lane.kind is LaneKind.INFER else MessageType.JOB
        try:
            if delivery.subject != self._bus.names.lane(delivery.lane):
                raise SubjectMismatch("the message did not come from the lane that was pulled")
            envelope = self._bus.verify_or_raise(delivery.frame, delivery.subject, kind, grace_ms=MAX_SKEW_MS)
            self._check_expiry(envelope.header, delivery.subject)
        except (ClockSkew, KeyExpired):
            delivery.abandon()
            return None
        except UnknownKey:
            # a new key may not have reached this worker yet
            await self._leave_for_redelivery(delivery)
            return None
        except EnvelopeError:
            await delivery.ack()
            return None
        try:
            bundle = Bundle(delivery, envelope.header, codec.decode_jobs(envelope.body, envelope.header.jobs))
        except BadEncoding as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            await self._fail_undecodable(Bundle(delivery, envelope.header, []))
            return None
        if not self._in_pool(delivery.lane, envelope.header, bundle.jobs):
            metrics.ENVELOPES_REJECTED.labels(SubjectMismatch.code).inc()
            log.error("rejected a bundle of another tenant", extra={"action": "pool_refused", "model": self._model})
            await delivery.ack()
            return None
        if any(job.sealed is not None for job in bundle.jobs):
            await self._decrypt(bundle)
        return bundle

    def _check_expiry(self, header: Header, subject: str) -> None:
        """Raise EnvelopeExpired by the dispatcher's clock; verification only allowed for clock skew."""
        late_ms = self._bus.clock.utc_ms() - header.expires_at
        if header.expires_at and late_ms >= 0:
            error = EnvelopeExpired(f"the bundle expired {late_ms} ms ago")
            self._bus.count_refused(error, subject)
            raise error

    async def _decrypt(self, bundle: Bundle) -> None:
        """Decrypt the jobs of tenants with encryption; fail those that cannot be decrypted, with the reason."""
        jobs, refused = await payload_encryption.opened(self._keyring, bundle.jobs)
        if refused:
            name, now = self._bus.signer.name, self._bus.clock.utc()
            ends = payload_encryption.refusals(refused, attempt=bundle.delivery.attempt, worker=name, now=now)
            await self.deliver([bundle], ends)
        bundle.jobs = jobs

    async def _leave_for_redelivery(self, delivery: Delivery) -> None:
        if delivery.attempt <= self._settings.max_attempts:
            delivery.abandon()
        else:
            await delivery.ack()

    def _in_pool(self, lane: Lane, header: Header, jobs: Sequence[Job]) -> bool:
        """Return True if the bundle is the lane's tenant's; shared lanes have no isolated tenant's jobs."""
        if header.tenant != lane.tenant:
            return False
        return not lane.tenant or all(job.tenant == lane.tenant for job in jobs)

    async def _fail_undecodable(self, bundle: Bundle) -> None:
        """Fail the jobs of a bundle that cannot be decoded: a gateway signed it, so callers wait for them."""
        failure = Failure(
            InferenceFailed.code,
            "the worker cannot decode the job; run the same version of Tether on gateway and worker",
        )
        name, now = self._bus.signer.name, self._bus.clock.utc()
        ends = [
            Outcome(JobId(job), JobState.FAILED, (), failure, bundle.delivery.attempt, name, 0.0, now)
            for job in bundle.header.jobs
        ]
        log.error("failed a bundle that cannot be decoded", extra={"action": "bundle_unreadable", "model": self._model})
        await self.deliver([bundle], ends)
        await bundle.delivery.ack()

    async def deliver(self, bundles: Sequence[Bundle], outcomes: Sequence[Outcome]) -> None:
        """Deliver outcomes: stored results for jobs lanes, reply bundles for infer lanes."""
        outcomes = payload_encryption.closed(
            self._keyring, [job for bundle in bundles for job in bundle.jobs], outcomes
        )
        if bundles[0].durable:
            deadlines = {job.id: job.deadline for bundle in bundles for job in bundle.jobs}
            ends = [as_it_counts(outcome, deadlines.get(outcome.job, math.inf)) for outcome in outcomes]
            await self.answers.commit(self._model, ends)
            return
        for outcome in outcomes:
            metrics.JOBS_FINISHED.labels(self._model, outcome.state.value).inc()
        by_id: dict[str, Outcome] = {outcome.job: outcome for outcome in outcomes}
        by_reply: dict[str, list[Outcome]] = {}
        for bundle in bundles:
            found = [by_id[job] for job in bundle.header.jobs if job in by_id]
            by_reply.setdefault(bundle.header.reply, []).extend(found)
        for reply, group in by_reply.items():
            if reply.startswith(self._bus.names.reply("")):
                await self.answers.reply(reply, group)
