"""Sends synchronous requests to lanes: many jobs, one message, one signature.

A bundle leaves at once while none is in flight (for a slow model: while some worker has none), so a single
caller never waits for a batch. Otherwise jobs gather until a reply arrives, the bundle is full or the delay
is over, so a thousand callers batch (``lane_bundler.py`` decides). A lane has only as many bundles in flight
as keep its workers busy; all other jobs wait here, in a queue that is fair between tenants, because the lane
itself is first come, first served. Jobs in flight are stored until they are answered: after a broker restart
their bundles are sent again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Container

from tether.bus.bus import Bus, Message
from tether.bus.key_value.keyrings import Keyring
from tether.crypto import Envelope, MessageType
from tether.domain.job import Job, JobId, JobState, Lane, Outcome, new_job_id
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    DeadlineExceeded,
    QueueFull,
    TetherError,
    Unavailable,
)
from tether.gateway_http.bundling.lane_bundler import InFlightBundle, LaneBundler
from tether.gateway_http.bundling.pending_request import Answer, PendingRequest, error_of
from tether.gateway_http.bundling.queue_policy import delays_s
from tether.gateway_http.bundling.refused_outcomes import refuse_end
from tether.gateway_http.bundling.withdrawals import Withdrawals
from tether.model.config import QueuePolicy
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.streams.job_queue import BusQueue
from tether.wire import codec

log = logging.getLogger(__name__)

_refused_full = metrics.LIMITED.labels("gateway")
_refused_queue = metrics.LIMITED.labels("queue")
_withdrawn_here = metrics.INFER_WITHDRAWN.labels("gateway")
_withdrawn_lane = metrics.INFER_WITHDRAWN.labels("lane")

_RECONNECT_S = 0.5
_OVERFULL = 1.25
"""Factor of ``max_inflight`` up to which tenants below their share are still admitted."""


def _no_policy(_: str) -> None:
    return None


class InferBundler:
    """The lanes of one gateway, and the inbox of their replies."""

    def __init__(
        self,
        bus: Bus,
        tasks: Tasks,
        workers: Callable[[Lane], int],
        keyring: Keyring,
        weight: Callable[[str], float],
        *,
        policy: Callable[[str], QueuePolicy | None] = _no_policy,
    ) -> None:
        self._bus = bus
        self._tasks = tasks
        self._workers = workers
        self._keyring = keyring
        self.weight = weight
        self._policy = policy
        self._queue = BusQueue(bus)
        self._lanes: dict[Lane, LaneBundler] = {}
        self._waiting: dict[JobId, PendingRequest] = {}
        self._withdrawn: dict[JobId, PendingRequest] = {}
        """Jobs that were sent and then withdrawn, until a worker has dropped them or their deadline passes."""
        self._withdrawals = Withdrawals(bus, tasks)
        self._held: dict[str, int] = {}
        self.flights: set[InFlightBundle] = set()
        self.reply = bus.names.reply(new_job_id())
        bus.on_reconnect(self._resend_unanswered)

    async def start(self) -> None:
        await self._bus.subscribe(self.reply, self._answered)

    @property
    def held(self) -> int:
        """Number of requests that wait for their reply."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Number of bundles with at least one awaited job."""
        return sum(flight.wanted for flight in self.flights)

    async def answer(self, lane: Lane, job: Job, timeout_s: float) -> Answer:
        """Submit a job and wait for its outputs; withdraw it if the wait is cancelled."""
        try:
            return await self.submit(lane, job, timeout_s)
        except asyncio.CancelledError:
            self.withdraw(job.id)
            raise

    def withdraw(self, job: JobId) -> None:
        """Withdraw a job whose caller left: release its quota at once, and let workers skip it if not yet
        started."""
        waiting = self._waiting.get(job)
        if waiting is None:
            return
        waiting.future.cancel()
        flight = waiting.flight
        if flight is None or not flight.sends:
            _withdrawn_here.inc()
            self._forget(job, waiting)
            return
        _withdrawn_lane.inc()
        self._release(job, waiting)
        self._withdrawn[job] = waiting
        flight.withdrawn.add(job)
        self._withdrawals.add(flight.bundler.lane, job, waiting.expires)

    def submit(self, lane: Lane, job: Job, timeout_s: float) -> asyncio.Future[Answer]:
        """Submit a job; the future resolves to its outputs or fails with its error.

        Raises:
            Unavailable: this gateway has as many requests pending as it may, for this tenant or for all.
            QueueFull: the version has as many pending as its model's queue policy allows.
        """
        bundler = self._lanes.get(lane)
        if bundler is None:
            bundler = self._lanes[lane] = LaneBundler(self, lane)
        policy = self._policy(lane.model)
        if policy is not None and 0 < policy.max_size <= bundler.held:
            _refused_queue.inc()
            raise QueueFull(
                f"{bundler.held} requests for model '{lane.model}' are already waiting "
                "(queue.max_size); try again later"
            )
        held = self._held.get(job.tenant, 0)
        if len(self._waiting) >= self._bus.settings.max_inflight:
            self._refuse_above_share(job.tenant, held)
        self._held[job.tenant] = held + 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        timer = loop.call_later(timeout_s, self._fail, job.id, None)
        waiting = self._waiting[job.id] = PendingRequest(future, timer, job.tenant, bundler, job.deadline)
        if policy is not None and policy.timeout_ms:
            self._limit(waiting, job, policy, timeout_s)
        bundler.held += 1
        bundler.add(job)
        return future

    def _limit(self, waiting: PendingRequest, job: Job, policy: QueuePolicy, timeout_s: float) -> None:
        """Apply the queue policy's timeout: yield to other requests, or fail if not sent by the job's
        deadline.

        For a job that was sent, the worker decides whether it was in time.
        """
        waiting.expires = self._bus.clock.utc() + timeout_s
        delay_s = delays_s(policy)
        if delay_s:
            waiting.late_at = self.now() + delay_s
        elif job.deadline < waiting.expires:
            left = job.deadline - self._bus.clock.utc()
            asyncio.get_running_loop().call_later(left, self._end_queued, job.id)

    def _end_queued(self, job: JobId) -> None:
        waiting = self._waiting.get(job)
        if waiting is not None and waiting.flight is None:
            self._fail(
                job, DeadlineExceeded("the request waited in the queue longer than its model allows (queue.timeout_ms)")
            )

    def _refuse_above_share(self, tenant: str, held: int) -> None:
        """Reject a request at a full gateway, unless its tenant is below its share and the overfill is below
        a quarter."""
        most = self._bus.settings.max_inflight
        weights = {name: self.weight(name) for name in (*self._held, tenant)}
        if held >= most * weights[tenant] / sum(weights.values()) or len(self._waiting) >= _OVERFULL * most:
            _refused_full.inc()
            raise Unavailable(f"this gateway already has {len(self._waiting)} requests pending; try again later")

    def pending_for_model(self, model: str) -> int:
        """Return the number of unanswered requests for a model."""
        return sum(bundler.held for lane, bundler in self._lanes.items() if lane.model == model)

    # called by LaneBundler

    def is_awaited(self, job: Job) -> bool:
        """Return True if a caller still waits for the job."""
        return job.id in self._waiting

    def should_yield(self, job: Job) -> bool:
        """Return True if the job has waited so long that it must let others pass."""
        waiting = self._waiting.get(job.id)
        return waiting is not None and waiting.late_at < math.inf and waiting.late_at <= self.now()

    def slots(self) -> int:
        """Bundles that a worker prefetches."""
        return max(2, self._bus.settings.worker_prefetch)

    def now(self) -> float:
        return self._bus.clock.monotonic()

    def workers(self, lane: Lane) -> int:
        return max(1, self._workers(lane))

    @property
    def settings_delay_s(self) -> float:
        return self._bus.settings.bundle_delay_ms / 1000

    @property
    def max_jobs(self) -> int:
        return self._bus.settings.bundle_max_jobs

    @property
    def max_bytes(self) -> int:
        return min(self._bus.settings.max_body_bytes, self._bus.room)

    def launch(self, flight: InFlightBundle) -> None:
        """Send a bundle; retry until the broker has stored it or none of its jobs is awaited."""
        self.flights.add(flight)
        flight.sent_at = self._bus.clock.monotonic()
        for job in flight.jobs:
            waiting = self._waiting.get(job.id)
            if waiting is None:
                flight.open.discard(job.id)
            else:
                waiting.flight = flight
        if not flight.open:
            self._complete_bundle(flight)
            return
        self._tasks.spawn(self._send(flight), "send-bundle")

    async def _send(self, flight: InFlightBundle, message_id: str = "") -> None:
        """Publish the bundle; a reused ``message_id`` lets the broker drop a duplicate of the same jobs."""
        lane = flight.bundler.lane
        subject = self._bus.names.lane(lane)
        jobs = [job for job in flight.jobs if job.id in flight.open and job.id not in flight.withdrawn]
        if not jobs:
            return
        flight.sends += 1
        message_id = flight.message_id = message_id or new_job_id()
        deadline = max(self._waiting[job.id].expires for job in jobs)
        frame = self._bus.signer.sign_envelope(
            MessageType.INFER,
            subject,
            codec.encode_jobs(jobs),
            reply=self.reply,
            message_id=message_id,
            jobs=tuple(job.id for job in jobs),
            attempt=flight.sends,
            tenant=lane.tenant,
            expires_at=int(deadline * 1000),
        )
        metrics.BUNDLE_JOBS.labels(lane.kind.value).observe(len(jobs))
        flight.sending = True
        await self._store(flight, lane, frame, message_id, deadline)
        flight.sending = False

    async def _store(self, flight: InFlightBundle, lane: Lane, frame: bytes, message_id: str, deadline: float) -> None:
        while flight.wanted:
            try:
                ttl = max(1.0, deadline - self._bus.clock.utc())
                await self._queue.enqueue(lane, frame, message_id=message_id, ttl_s=ttl)
                return
            except BrokerUnavailable:
                await self._bus.wait_connected(_RECONNECT_S)
                await asyncio.sleep(0.05)
            except TetherError as error:
                for job_id in list(flight.open):
                    self._fail(job_id, error)
                return

    def _resend_unanswered(self) -> None:
        """Resend every unanswered bundle: infer lanes live in the broker's memory, and replies may have been
        lost."""
        for flight in [flight for flight in self.flights if not flight.sending]:
            self._send_again(flight)

    def stream_renewed(self, streams: Container[str]) -> None:
        """Resend bundles of infer streams that were recreated and thus lost their messages.

        Reuses message ids, so the broker drops those that the new stream already has.
        """
        for flight in [flight for flight in self.flights if not flight.sending]:
            if self._bus.names.lane_stream(flight.bundler.lane) in streams:
                self._send_again(flight, flight.message_id)

    def _send_again(self, flight: InFlightBundle, message_id: str = "") -> None:
        for job in list(flight.withdrawn):
            self._forget_withdrawn(job)
        if flight.open:
            metrics.INFER_RESUBMITTED.inc()
            self._tasks.spawn(self._send(flight, message_id), "send-again")

    # replies

    async def _answered(self, message: Message) -> None:
        envelope = self._bus.verify_message(message, MessageType.ANSWER)
        if envelope is None:
            return
        try:
            outcomes = codec.decode_outcomes(envelope.body)
        except BadEncoding as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            return
        for outcome in outcomes:
            self._settle(outcome if outcome.sealed is None else await self._opened(outcome), envelope)

    async def _opened(self, outcome: Outcome) -> Outcome:
        waiting = self._waiting.get(outcome.job)
        return outcome if waiting is None else await self._keyring.open_outcome(waiting.tenant, outcome)

    def _settle(self, outcome: Outcome, envelope: Envelope) -> None:
        job = outcome.job
        waiting = self._waiting.get(job) or self._withdrawn.get(job)
        if waiting is None:
            metrics.ANSWERS_LATE.inc()
            return
        if waiting.flight is None or waiting.flight.bundler.lane.tenant != envelope.sender_tenant:
            refuse_end(job, envelope.sender)
            return
        succeeded = outcome.state is JobState.SUCCEEDED
        if succeeded:
            waiting.flight.ran(outcome)
        if job in self._withdrawn:
            if outcome.state is not JobState.CANCELLED:
                metrics.ANSWERS_LATE.inc()
            self._forget_withdrawn(job)
        elif succeeded:
            self._forget(job, waiting)
            if not waiting.future.done():
                waiting.future.set_result(outcome.outputs)
        else:
            self._fail(job, error_of(outcome))

    def _fail(self, job: JobId, error: TetherError | None) -> None:
        waiting = self._waiting.get(job)
        if waiting is None:
            self._forget_withdrawn(job)
            return
        self._forget(job, waiting)
        if not waiting.future.done():
            waiting.future.set_exception(error or DeadlineExceeded("no reply before the request's deadline"))

    def _forget(self, job: JobId, waiting: PendingRequest) -> None:
        self._release(job, waiting)
        self._close(job, waiting)

    def _forget_withdrawn(self, job: JobId) -> None:
        waiting = self._withdrawn.pop(job, None)
        if waiting is not None:
            self._close(job, waiting)

    def _release(self, job: JobId, waiting: PendingRequest) -> None:
        """Release the quota of a request in this gateway."""
        del self._waiting[job]
        waiting.bundler.held -= 1
        held = self._held[waiting.tenant]
        if held > 1:
            self._held[waiting.tenant] = held - 1
        else:
            del self._held[waiting.tenant]

    def _close(self, job: JobId, waiting: PendingRequest) -> None:
        """Finish a job for which no more replies are expected."""
        waiting.timer.cancel()
        flight = waiting.flight
        if flight is None:
            waiting.bundler.ended_unsent()
        elif flight.close(job):
            self._complete_bundle(flight)

    def _complete_bundle(self, flight: InFlightBundle) -> None:
        if flight in self.flights:
            self.flights.discard(flight)
            total_s = self._bus.clock.monotonic() - flight.sent_at
            flight.bundler.on_bundle_answered(len(flight.jobs), flight.ended - flight.began, total_s)
