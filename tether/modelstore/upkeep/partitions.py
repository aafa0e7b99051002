"""The partitions of one model store: acquired, served, kept by heartbeats, and released.

A store counts itself as owner until ``partition_lease_s`` after it began to send the last stored heartbeat.
Others
count from when they saw that heartbeat, which is later, so two never both count themselves as the owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

from tether.bus.bus import Bus
from tether.bus.key_value.leases import LeaseBucket, LeaseState
from tether.domain.partition import Lease, StoreHeartbeat, plan
from tether.errors import TetherError, Unavailable
from tether.process import lifecycle, metrics
from tether.process.data_dir import private_folder
from tether.process.os_process import locked

log = logging.getLogger(__name__)

BEATS = 6
"""Heartbeats per ``partition_lease_s``, at least one per second. A store that did not read for half of that
time cannot tell which stores are silent, so there must be several.
"""
_MARGIN = 0.9
"""Share of ``partition_lease_s`` that an owner relies on: clocks may run at different speeds."""

Serve = Callable[[Lease], AbstractAsyncContextManager[None]]


class StoreInstance:
    """One run of one model store, and a private folder below ``scratch``.

    The folder is locked while the process lives, so folders of dead processes are found and deleted: ``dead``
    has their names.
    """

    def __init__(self, scratch: Path) -> None:
        self.name = secrets.token_hex(8)
        self.folder = scratch / self.name
        private_folder(scratch)
        self.dead = frozenset(path.name for path in scratch.iterdir() if _clear(path))
        self.folder.mkdir(mode=0o700)
        self._lock = _locked(self.folder)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _locked(folder: Path) -> int | None:
    """Return a descriptor that locks the folder; None if another process has locked it."""
    return locked(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def _clear(path: Path) -> bool:
    """Delete the folder of a killed process; return False if the process lives."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return False
    lock = _locked(path)
    if lock is None:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return True


class Partitions:
    """One model store's share of the partitions. ``serve`` is entered for each lease acquired, and left when
    it is lost.
    """

    def __init__(self, bus: Bus, instance: str, serve: Serve, dead: Collection[str] = ()) -> None:
        self._bus = bus
        self._own = instance
        self._serve = serve
        self._dead = set(dead)
        self._lease_s = bus.settings.partition_lease_s
        self._beat_s = min(1.0, self._lease_s / BEATS)
        self._bucket = LeaseBucket(bus)
        self._tasks = lifecycle.Tasks()
        self._held: dict[int, Lease] = {}
        self._leave: dict[int, asyncio.Event] = {}
        self._leaving: set[int] = set()
        self._until = float("-inf")
        self._looked = float("-inf")
        self._last: dict[str, tuple[int, float]] = {}
        """Of each instance: the sequence of its last heartbeat, and when that was first seen."""
        self._beat = 0
        self._unowned = list(range(bus.names.partitions))

    # queries

    def owned(self) -> list[int]:
        """The partitions it owns now."""
        return sorted(self._held) if self._bus.clock.monotonic() < self._until else []

    def check(self, lease: Lease) -> None:
        """Check that it may write entries of models in a partition; a lease acquired again meanwhile is a
        different one.

        Raises:
            Unavailable: it no longer owns the partition, or cannot know.
        """
        if self._held.get(lease.partition) != lease or self._bus.clock.monotonic() >= self._until:
            raise Unavailable(
                f"partition {lease.partition} now belongs to another model store; try again", retry_after=2
            )

    def checks(self) -> dict[str, str]:
        """Return readiness checks: whether every partition has an owner, and whether this store's heartbeats
        are stored.
        """
        listed = ", ".join(map(str, self._unowned[:8]))
        late = self._bus.clock.monotonic() >= self._until
        return {
            "partitions": f"no model store owns {listed}" if listed else "ok",
            "leases": "the broker has not stored its last heartbeats" if late else "ok",
        }

    # leases

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Take part until the block ends, then hand over its partitions."""
        try:
            async with lifecycle.tasks() as tasks:
                await self._rebalance()
                tasks.spawn(self._go_on(), "partitions")
                yield
        finally:
            await self._hand_over()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await self._rebalance()

    async def _rebalance(self) -> None:
        try:
            async with asyncio.timeout(self._lease_s):
                await self._sign()
                await self._share(await self._bucket.read_all())
        except (TetherError, TimeoutError) as error:
            log.warning("partitions: %s", error or "no answer in time", extra={"action": "lease_failed"})
        metrics.PARTITIONS.set(len(self.owned()))

    async def _sign(self) -> None:
        began = self._bus.clock.monotonic()
        self._beat += 1
        await self._bucket.sign(StoreHeartbeat(self._own, self._beat))
        self._until = began + self._lease_s * _MARGIN

    async def _share(self, seen: LeaseState) -> None:
        """Bring its partitions in line with the bucket, then acquire or release some."""
        living = self._living(seen)
        owners = {number: lease.owner for number, (_, lease) in seen.leases.items() if lease is not None}
        for number, lease in list(self._held.items()):
            if seen.leases.get(number, (0, None))[1] != lease and number not in self._leaving:
                self._drop(number)
        for number in [number for number, owner in owners.items() if owner == self._own and number not in self._held]:
            del owners[number]  # acquired by a write whose reply was lost: it acquires it again
        take, leave = plan(self._own, self._bus.names.partitions, owners, living)
        for number in take:
            sequence = seen.leases.get(number, (0, None))[0]
            taken = await self._bucket.transfer(number, self._own, sequence)
            if taken is not None:
                self._take(taken, owners.get(number, ""))
        for number in leave:
            if number in self._leave:
                self._leave[number].set()
        served = {number for number, owner in owners.items() if owner in living} | self._held.keys()
        self._unowned = [number for number in range(self._bus.names.partitions) if number not in served]

    def _living(self, seen: LeaseState) -> set[str]:
        """Return instances with valid leases: a heartbeat younger than ``partition_lease_s`` here, or not
        read for so long.
        """
        now = self._bus.clock.monotonic()
        blind = now - self._looked > self._lease_s / 2
        self._looked = now
        owners = {lease.owner for _, lease in seen.leases.values() if lease is not None and lease.owner}
        for name in (owners | seen.signs.keys()) - self._dead:
            sequence = seen.signs.get(name, 0)
            if blind or self._last.get(name, (-1, 0.0))[0] != sequence:
                self._last[name] = (sequence, now)
        self._last = {name: last for name, last in self._last.items() if name in owners or name in seen.signs}
        return {name for name, (_, since) in self._last.items() if now - since < self._lease_s} | {self._own}

    def _take(self, lease: Lease, before: str) -> None:
        self._held[lease.partition] = lease
        self._leave[lease.partition] = asyncio.Event()
        self._tasks.spawn(self._hold_lease(lease, self._leave[lease.partition]), f"partition-{lease.partition}")
        fields = {"action": "partition_taken", "partition": lease.partition, "epoch": lease.epoch}
        log.info(
            "took over partition %d%s", lease.partition, " from one that is silent" if before else "", extra=fields
        )

    def _drop(self, number: int) -> None:
        """Drop a partition that another store has; pending work fails at its next write."""
        del self._held[number]
        self._leave.pop(number).set()
        log.warning("lost partition %d to another model store", number, extra={"action": "partition_lost"})

    async def _hold_lease(self, lease: Lease, leave: asyncio.Event) -> None:
        """Serve until the partition is to be released, finish pending work, and pass it on."""
        number = lease.partition
        try:
            async with self._serve(lease):
                await leave.wait()
        finally:
            if self._held.get(number) == lease:
                self._leaving.add(number)
                try:
                    await self._give_back(lease)
                finally:
                    del self._held[number], self._leave[number]
                    self._leaving.discard(number)

    async def _give_back(self, lease: Lease) -> None:
        """Release the lease; without a broker it expires."""
        with suppress(TetherError):
            seen = await self._bucket.read_all()
            sequence, current = seen.leases.get(lease.partition, (0, None))
            if current == lease:
                await self._bucket.transfer(lease.partition, "", sequence)
        log.info(
            "released partition %d", lease.partition, extra={"action": "partition_left", "partition": lease.partition}
        )

    async def _hand_over(self) -> None:
        for event in self._leave.values():
            event.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._bus.settings.shutdown_timeout_s + self._lease_s):
                while len(self._tasks):
                    await self._tasks.finish(self._beat_s)
                    with suppress(TetherError):
                        await self._sign()
        await self._tasks.cancel()
        with suppress(TetherError):
            await self._bucket.forget(self._own)
