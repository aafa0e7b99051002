"""Waiting requests on their way to a lane: many jobs, one message, one signature.

A bundle leaves at once while none is in flight (none on any worker, for a model that takes long to run), so one caller
waits for nobody. Otherwise jobs gather until an answer arrives, the bundle is full, or the delay is up, so a thousand callers
batch (``lane_bundler.py`` decides). Only so many bundles are in flight for a lane as keep its workers busy: what is beyond
that waits here, in a queue that is fair between tenants, and not in the lane, which is first come, first served. Every job
in flight is remembered until it is answered: after a broker restart its bundle is sent again.
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
"""How far above ``max_inflight`` those who hold less than their share may still come in."""


def _no_policy(_: str) -> None:
    return None


class InferBundler:
    """All lanes of one gateway, and the inbox its answers come to."""

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
        """Sent, and nobody waits for them any more: until a worker has dropped them, or their deadline."""
        self._withdrawals = Withdrawals(bus, tasks)
        self._held: dict[str, int] = {}
        self.flights: set[InFlightBundle] = set()
        self.reply = bus.names.reply(new_job_id())
        bus.on_reconnect(self._resend_unanswered)

    async def start(self) -> None:
        await self._bus.subscribe(self.reply, self._answered)

    @property
    def held(self) -> int:
        """Requests that wait for their answer."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Bundles with a job that somebody waits for."""
        return sum(flight.wanted for flight in self.flights)

    async def answer(self, lane: Lane, job: Job, timeout_s: float) -> Answer:
        """:meth:`submit`, and wait; a wait that is cancelled withdraws the job."""
        try:
            return await self.submit(lane, job, timeout_s)
        except asyncio.CancelledError:
            self.withdraw(job.id)
            raise

    def withdraw(self, job: JobId) -> None:
        """Nobody waits for a job any more: what it held is free at once, and workers that have not begun it drop it."""
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
        """Put a job on its way; the future has its outputs, or the error it ended with.

        Raises:
            Unavailable: this gateway holds as many requests as it may, of this tenant or of all.
            QueueFull: it holds as many for this version as its model's queue policy allows.
        """
        bundler = self._lanes.get(lane)
        if bundler is None:
            bundler = self._lanes[lane] = LaneBundler(self, lane)
        policy = self._policy(lane.model)
        if policy is not None and 0 < policy.max_size <= bundler.held:
            _refused_queue.inc()
            raise QueueFull(
                f"{bundler.held} requests for model '{lane.model}' wait already (queue.max_size); try again"
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
        """What the queue policy says about waiting: to let others pass, or to end when the job has not left by its
        deadline. Of one that has left, the worker says whether it was in time."""
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
            self._fail(job, DeadlineExceeded("the request waited longer than its model allows (queue.timeout_ms)"))

    def _refuse_above_share(self, tenant: str, held: int) -> None:
        """A full gateway still takes in tenants that hold less than their share, up to a quarter more."""
        most = self._bus.settings.max_inflight
        weights = {name: self.weight(name) for name in (*self._held, tenant)}
        if held >= most * weights[tenant] / sum(weights.values()) or len(self._waiting) >= _OVERFULL * most:
            _refused_full.inc()
            raise Unavailable(f"this gateway already holds {len(self._waiting)} requests; try again")

    def pending_for_model(self, model: str) -> int:
        """Requests for a model that nobody has answered yet."""
        return sum(bundler.held for lane, bundler in self._lanes.items() if lane.model == model)

    # called by lanes

    def is_awaited(self, job: Job) -> bool:
        """Whether somebody still waits for it."""
        return job.id in self._waiting

    def should_yield(self, job: Job) -> bool:
        """Whether it has waited so long that it is to let others pass."""
        waiting = self._waiting.get(job.id)
        return waiting is not None and waiting.late_at < math.inf and waiting.late_at <= self.now()

    def slots(self) -> int:
        """Bundles that a worker keeps at hand."""
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
        """Send a bundle, again and again until the broker has it or nobody waits for it any more."""
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
        """``message_id``: that of an earlier message with the same jobs, of which the broker takes only one."""
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
        """The broker was away: infer lanes live in its memory, and answers may have been lost on the way."""
        for flight in [flight for flight in self.flights if not flight.sending]:
            self._send_again(flight)

    def stream_renewed(self, streams: Container[str]) -> None:
        """Streams of infer lanes were made again, and what was in them before is lost. What they hold by now is not stored
        a second time, since it has the same id."""
        for flight in [flight for flight in self.flights if not flight.sending]:
            if self._bus.names.lane_stream(flight.bundler.lane) in streams:
                self._send_again(flight, flight.message_id)

    def _send_again(self, flight: InFlightBundle, message_id: str = "") -> None:
        for job in list(flight.withdrawn):
            self._forget_withdrawn(job)
        if flight.open:
            metrics.INFER_RESUBMITTED.inc()
            self._tasks.spawn(self._send(flight, message_id), "send-again")

    # answers

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
            waiting.future.set_exception(error or DeadlineExceeded("no answer before the request's deadline"))

    def _forget(self, job: JobId, waiting: PendingRequest) -> None:
        self._release(job, waiting)
        self._close(job, waiting)

    def _forget_withdrawn(self, job: JobId) -> None:
        waiting = self._withdrawn.pop(job, None)
        if waiting is not None:
            self._close(job, waiting)

    def _release(self, job: JobId, waiting: PendingRequest) -> None:
        """Give back what a request holds in this gateway."""
        del self._waiting[job]
        waiting.bundler.held -= 1
        held = self._held[waiting.tenant]
        if held > 1:
            self._held[waiting.tenant] = held - 1
        else:
            del self._held[waiting.tenant]

    def _close(self, job: JobId, waiting: PendingRequest) -> None:
        """Nothing more is to come for a job."""
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
