"""Probes a gateway's dependencies: a lane in memory, a lane on disk, and a result that is written and read
back.

Each probe is a real write that expires after a second, so it takes the path of a request's message: through
the stream's bounds, its leader and its disk. Readiness reports the last probe.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.errors import BrokerUnavailable, PermissionDenied, QueueFull, TetherError
from tether.streams.broker_storage import BrokerStorage
from tether.streams.layout import ENDS
from tether.streams.usage import stream_use

log = logging.getLogger(__name__)

PROBE_S = 5.0
"""Seconds between probes while everything works."""

AGAIN_S = 0.5
"""Seconds between probes while something fails."""

TRY_S = 3.0
"""Timeout of a probe in seconds."""

BROKER, INFERENCE, JOBS, RESULTS, STORAGE = "broker", "inference", "jobs", "results", "storage"

_NO_TTL = 10166
"""Error code of a stream of an older version, which the dispatcher has not migrated yet."""
_TTL = {"Nats-TTL": "1"}
_REPLICA_S = (0.0, 0.05, 0.1, 0.3)


class Readiness:
    """State of one gateway's dependencies. ``storage`` is checked separately."""

    def __init__(self, bus: Bus, storage: BrokerStorage) -> None:
        self._bus = bus
        self._storage = storage
        names = bus.names
        self._tries: dict[str, Callable[[], Awaitable[Any]]] = {
            INFERENCE: lambda: self._write([names.infer_probe(shard) for shard in range(names.infer_shards)]),
            JOBS: lambda: self._write([names.jobs_probe(shard) for shard in range(names.job_shards)]),
            RESULTS: self._read_back,
        }
        self._found: dict[str, str] = dict.fromkeys(self._tries, "not probed yet")
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        bus.on_reconnect(self._wake.set)

    async def keep(self) -> None:
        """Probe until cancelled."""
        while True:
            self._wake.clear()
            await self.probe()
            fine = self._bus.connected and all(state == "ok" for state in self._found.values())
            try:
                async with asyncio.timeout(PROBE_S if fine else AGAIN_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def probe(self) -> None:
        """Probe every dependency once. Skip those on disk while it is full: a failed write would stop the
        stream for good."""
        names = [name for name in self._tries if name == INFERENCE or not self._storage.full]
        states = await asyncio.gather(*[self._try(name) for name in names])
        found = dict.fromkeys(self._tries, "not probed: the broker's storage is full") | dict(
            zip(names, states, strict=True)
        )
        for name, state in found.items():
            if state != self._found[name]:
                level = logging.INFO if state == "ok" else logging.WARNING
                log.log(
                    level, "dependency %s changed: %s", name, state, extra={"action": "dependency", "dependency": name}
                )
        self._found = found

    async def _try(self, name: str) -> str:
        if not self._bus.connected:
            return "the broker is not connected"
        try:
            await self._tries[name]()
        except JetStreamError as error:
            return "ok" if error.err_code == _NO_TTL else error.message
        except QueueFull as full:
            # A full lane is full of other work: requests are answered, by 429. With full results no job can
            # finish.
            return "ok" if name != RESULTS else f"the results of durable jobs are full: {full.message}"
        except TetherError as error:
            return error.message
        return "ok"

    async def _write(self, subjects: list[str]) -> None:
        for subject in subjects:
            await self._bus.publish_acked(subject, b"", headers=dict(_TTL), timeout=TRY_S)

    async def _read_back(self) -> None:
        stream, run = self._bus.names.results_stream, self._bus.inbox.rpartition(".")[2]
        subject = self._bus.names.result_probe(f"{run}-{next(self._numbers)}")
        await self._bus.publish_acked(subject, b"", headers=dict(_TTL), timeout=TRY_S)
        for pause in _REPLICA_S:  # the replica that answers may lag behind
            await asyncio.sleep(pause)
            if await self._bus.direct_get(stream, subject, timeout=TRY_S) is not None:
                return await self._room(stream)
        raise BrokerUnavailable(f"a probe stored in '{stream}' could not be read back")

    async def _room(self, stream: str) -> None:
        """Check that outputs can be stored; the remaining space may be reserved for outcomes without outputs."""
        with suppress(PermissionDenied):  # the broker's configuration is of an older version
            use = await stream_use(self._bus, stream, timeout=TRY_S)
            if use is not None and use.share >= 1 - ENDS:
                raise QueueFull("the remaining space is reserved for outcomes without outputs")

    def checks(self) -> dict[str, str]:
        """Return every dependency by name: ``ok``, or the problem."""
        return {
            BROKER: "ok" if self._bus.connected else "not connected",
            **(self._found if self._bus.connected else dict.fromkeys(self._found, "the broker is not connected")),
            STORAGE: self._storage.full or "ok",
        }

    def infers(self) -> bool:
        """Return True if synchronous requests can be answered: they need no disk."""
        checks = self.checks()
        return checks[BROKER] == checks[INFERENCE] == "ok"
