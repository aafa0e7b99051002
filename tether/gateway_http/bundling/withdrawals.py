"""Tells workers which jobs of a lane nobody waits for any more, so that they are not run.

A signed message on the lane's own core NATS subject; nothing is stored. A message that is lost costs a run for nobody,
which the job's deadline bounds.
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

_TOGETHER_S = 0.005
"""Jobs that are withdrawn within this time travel in one message."""

_MOST = 1000
"""Jobs in one message."""


class Withdrawals:
    """What one gateway takes back from its lanes."""

    def __init__(self, bus: Bus, tasks: Tasks) -> None:
        self._bus = bus
        self._tasks = tasks
        self._waiting: dict[Lane, dict[JobId, float]] = {}

    def add(self, lane: Lane, job: JobId, expires: float) -> None:
        """Take a job back; after ``expires`` (UTC seconds) no worker would run it anyhow."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(_TOGETHER_S, self._tell)
        self._waiting.setdefault(lane, {})[job] = expires

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self._tasks.spawn(self._send(waiting), "withdraw")

    async def _send(self, waiting: dict[Lane, dict[JobId, float]]) -> None:
        for lane, jobs in waiting.items():
            subject, ids = self._bus.names.withdrawn(lane), list(jobs)
            for start in range(0, len(ids), _MOST):
                part = ids[start : start + _MOST]
                body = codec.encode(Withdrawal(tuple(part), max(jobs[job] for job in part)))
                frame = self._bus.signer.sign_envelope(MessageType.RESULT, subject, body, message_id=new_job_id())
                with contextlib.suppress(BrokerUnavailable):
                    await self._bus.publish(subject, frame)
