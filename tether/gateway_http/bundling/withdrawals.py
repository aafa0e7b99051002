"""Tells workers which jobs of a lane were withdrawn, so that they are not run.

Sends a signed message on the lane's own core NATS subject; nothing is stored. A lost message costs a useless
run, at most until the job's deadline.
"""

from __future__ import annotations

import asyncio
import contextlib

from tether.bus.bus import Bus
from tether.crypto import MessageType
from tether.domain.job import JobId, Lane, Withdrawal, new_job_id
from tether.errors import BrokerUnavailable
from tether.process.lifecycle import Tasks
from tether.wire import codec

_COLLECT_S = 0.005
"""Jobs withdrawn within this time share one message."""

_MAX_JOBS = 1000
"""Jobs in one message."""


class Withdrawals:
    """Withdrawn jobs of one gateway that workers are not informed of yet."""

    def __init__(self, bus: Bus, tasks: Tasks) -> None:
        self._bus = bus
        self._tasks = tasks
        self._waiting: dict[Lane, dict[JobId, float]] = {}

    def add(self, lane: Lane, job: JobId, expires: float) -> None:
        """Withdraw a job. After ``expires`` (UTC seconds) no worker would run it anyway."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(_COLLECT_S, self._flush)
        self._waiting.setdefault(lane, {})[job] = expires

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self._tasks.spawn(self._send(waiting), "withdraw")

    async def _send(self, waiting: dict[Lane, dict[JobId, float]]) -> None:
        for lane, jobs in waiting.items():
            subject, ids = self._bus.names.withdrawn(lane), list(jobs)
            for start in range(0, len(ids), _MAX_JOBS):
                part = ids[start : start + _MAX_JOBS]
                body = codec.encode(Withdrawal(tuple(part), max(jobs[job] for job in part)))
                frame = self._bus.signer.sign_envelope(MessageType.RESULT, subject, body, message_id=new_job_id())
                with contextlib.suppress(BrokerUnavailable):
                    await self._bus.publish(subject, frame)
