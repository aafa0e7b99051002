"""What a gateway needs, tried now and then: a lane in memory, a lane on disk, a result that is written and read back.

Each try is a real write that deletes itself after a second, so it goes the way that a request's message goes: through the
stream's bounds, its leader and its disk. Readiness asks for what the last try found.
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
"""Between two tries while everything works."""

AGAIN_S = 0.5
"""Between two tries while something does not."""

TRY_S = 3.0
"""How long a try may take."""

BROKER, INFERENCE, JOBS, RESULTS, STORAGE = "broker", "inference", "jobs", "results", "storage"

_NO_TTL = 10166
"""The stream was made by an older version, and its dispatcher has not changed it yet."""
_TTL = {"Nats-TTL": "1"}
_REPLICA_S = (0.0, 0.05, 0.1, 0.3)


class Readiness:
    """What the dependencies of one gateway do. ``storage`` is looked at by itself."""

    def __init__(self, bus: Bus, storage: BrokerStorage) -> None:
        self._bus = bus
        self._storage = storage
        names = bus.names
        self._tries: dict[str, Callable[[], Awaitable[Any]]] = {
            INFERENCE: lambda: self._write([names.infer_probe(shard) for shard in range(names.infer_shards)]),
            JOBS: lambda: self._write([names.jobs_probe(shard) for shard in range(names.job_shards)]),
            RESULTS: self._read_back,
        }
        self._found: dict[str, str] = dict.fromkeys(self._tries, "not tried yet")
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        bus.on_reconnect(self._wake.set)

    async def keep(self) -> None:
        """Try for ever."""
        while True:
            self._wake.clear()
            await self.look()
            fine = self._bus.connected and all(state == "ok" for state in self._found.values())
            try:
                async with asyncio.timeout(PROBE_S if fine else AGAIN_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Try every dependency once. What is on disk is not tried while there is no room: a failed write would stop its
        stream for good."""
        names = [name for name in self._tries if name == INFERENCE or not self._storage.full]
        states = await asyncio.gather(*[self._try(name) for name in names])
        found = dict.fromkeys(self._tries, "not tried: there is no room to store") | dict(
            zip(names, states, strict=True)
        )
        for name, state in found.items():
            if state != self._found[name]:
                level = logging.INFO if state == "ok" else logging.WARNING
                log.log(level, "%s: %s", name, state, extra={"action": "dependency", "dependency": name})
        self._found = found

    async def _try(self, name: str) -> str:
        if not self._bus.connected:
            return "the broker is not connected"
        try:
            await self._tries[name]()
        except JetStreamError as error:
            return "ok" if error.err_code == _NO_TTL else error.message
        except QueueFull as full:
            # a full lane is full of other work: requests are answered, by 429; with full results no job can end
            return "ok" if name != RESULTS else f"results of durable jobs have no room: {full.message}"
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
        for pause in _REPLICA_S:  # a replica that answers may be a moment behind
            await asyncio.sleep(pause)
            if await self._bus.direct_get(stream, subject, timeout=TRY_S) is not None:
                return await self._room(stream)
        raise BrokerUnavailable(f"what was stored in '{stream}' cannot be read back")

    async def _room(self, stream: str) -> None:
        """Whether outputs are stored; what is left may be for ends without outputs alone."""
        with suppress(PermissionDenied):  # the broker's configuration is of an older version
            use = await stream_use(self._bus, stream, timeout=TRY_S)
            if use is not None and use.share >= 1 - ENDS:
                raise QueueFull("what is left is kept for ends without outputs")

    def checks(self) -> dict[str, str]:
        """Every dependency by name: ``ok``, or what is wrong with it."""
        return {
            BROKER: "ok" if self._bus.connected else "not connected",
            **(self._found if self._bus.connected else dict.fromkeys(self._found, "the broker is not connected")),
            STORAGE: self._storage.full or "ok",
        }

    def infers(self) -> bool:
        """Whether synchronous requests are answered: they need no disk."""
        checks = self.checks()
        return checks[BROKER] == checks[INFERENCE] == "ok"
